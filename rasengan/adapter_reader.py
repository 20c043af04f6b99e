"""Read an adapter of any layout: diffusers', PEFT's, kohya's (which AUTOMATIC1111 reads) and ComfyUI's."""

import dataclasses
import math
import re
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from peft import LoraConfig

from rasengan import UserError, adapter_settings, first_line
from rasengan.adapters import (
    ADAPTABLE,
    DIFFUSERS_FILE,
    KINDS,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    Adapter,
    Config,
    WithoutAlphaError,
    by_module,
    default_alpha,
    infer_config,
    modules_without_alpha,
    shown,
    split_key,
    what_is_malformed,
)
from rasengan.families import SDXL, guess_family, is_whole_model, not_in_sdxl, other_method
from rasengan.naming import KOHYA_PARTS, parse_kohya_name
from rasengan.tensor_files import found_file, read_tensors


Tensors = dict[str, torch.Tensor]

# What is a weight as it stands. Whole numbers, and some of the floats below 16 bits, are to be multiplied by a scale.
PLAIN = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


def read_adapter(path: Path, lora_alpha: float | None = None, allow_pickle: bool = False) -> Adapter:
    """Read an adapter from a file, a PEFT folder, or a folder with `pytorch_lora_weights.safetensors`.

    The weights have the dtype of the file. A module's own rank and alpha, as kohya's layout has them, stand in the
    patterns of the component's settings.

    Args:
        path: a folder with an `adapter_config.json` is read as PEFT's; every `checkpoint-N` is one of the last kind.
        lora_alpha: what alpha was in training, of the modules whose alpha the file leaves open.
        allow_pickle: read a `.bin`, `.ckpt`, `.pt` or `.pth` too, tensors alone.

    Raises:
        UserError: there is no adapter, it is a pickle, damaged, quantised, of another layout or model family, without
            alpha, or states every alpha, and another than `lora_alpha`.
    """
    return read_adapters([path], lora_alpha, allow_pickle)[0]


def read_adapters(paths: list[Path], lora_alpha: float | None = None, allow_pickle: bool = False) -> list[Adapter]:
    """Read several adapters as `read_adapter` does; `lora_alpha` is of those that leave an alpha open."""
    found = [_read(path, lora_alpha, allow_pickle) for path in paths]
    if lora_alpha is not None and not any(is_open for _, is_open in found):
        for path, (adapter, _) in zip(paths, found, strict=True):
            for name, config in adapter.configs.items():
                if default_alpha(config) != lora_alpha:
                    raise UserError(
                        f"--lora_alpha is {lora_alpha:g}, but {path} says {default_alpha(config):g} for the {name}. "
                        "Drop --lora_alpha: --lora_scale is what changes the strength."
                    )
    return [adapter for adapter, _ in found]


def _read(path: Path, lora_alpha: float | None, allow_pickle: bool) -> tuple[Adapter, bool]:
    """Return an adapter, and whether it leaves an alpha open, which is then `lora_alpha`."""
    if is_peft_folder(path):
        adapter, is_open = _read_peft_folder(path, lora_alpha, allow_pickle)
    else:
        if (path / PEFT_FILE).is_file() and not (path / DIFFUSERS_FILE).is_file():
            raise UserError(f"{path} holds {PEFT_FILE} without {PEFT_CONFIG}, which says its alpha. Copy both.")
        file = found_file(path / DIFFUSERS_FILE) if path.is_dir() else path
        adapter, is_open = _read_single_file(file, lora_alpha, allow_pickle)
    if not any(adapter.weights.values()):
        raise _without_weights(path)
    for name, weights in adapter.weights.items():
        if strangers := [key for key in weights if split_key(key) is None]:
            raise UserError(
                f"{path} holds {len(strangers)} weights of the {name} that are no part of a LoRA, LoHa or LoKr, such "
                f"as {strangers[0]}. Export the adapter again without them."
            )
        if quantised := next((key for key, tensor in weights.items() if tensor.dtype not in PLAIN), None):
            dtype = str(weights[quantised].dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: weights are {dtype}, not plain floating point, such as the {name}'s {quantised}. Give the "
                "adapter in fp16, bf16 or fp32, as it was before it was quantised."
            )
        for module, parts in by_module(weights).items():
            if problem := what_is_malformed(adapter.configs[name], module, parts):
                raise UserError(f"{path} is damaged: {problem}. Give the adapter as its training left it.")
    return adapter, is_open


def is_peft_folder(path: Path) -> bool:
    """Say whether a folder is one of PEFT, perhaps with text encoders in folders of their own."""
    return any((folder / PEFT_CONFIG).is_file() for folder in _peft_folders(path).values())


def _peft_folders(path: Path) -> dict[str, Path]:
    return {"unet": path} | {name: path / name for name in ADAPTABLE[1:] if (path / name).is_dir()}


def _without_weights(path: Path, others: Collection[str] = ()) -> UserError:
    but = f", but {len(others)} of other names, such as {next(iter(others))}" if others else ""
    return UserError(f"{path} holds no LoRA weights{but}. Give the adapter of a training, or export it again.")


_NAMED_PART = re.compile(r"(.+\.(?:lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$)([^.]+)(\.weight)?")


def _bare_names(weights: Tensors) -> Tensors:
    """Return weights without the name of their adapter, as a model under PEFT has it, if all have one and the same."""
    named = {key: _NAMED_PART.fullmatch(key) for key in weights}
    if all(named.values()) and len({match[2] for match in named.values()}) == 1:
        weights = {match[1] + (match[3] or ""): weights[key] for key, match in named.items()}
    # Some versions of PEFT keep the name of the module that holds DoRA's vector.
    return {key.replace("magnitude_vector.weight", "magnitude_vector"): tensor for key, tensor in weights.items()}


# --- PEFT folders ---


def _read_peft_folder(path: Path, lora_alpha: float | None, allow_pickle: bool) -> tuple[Adapter, bool]:
    folders, is_open = _peft_folders(path), False
    if not (path / PEFT_CONFIG).is_file():  # text encoders alone
        del folders["unet"]
    weights, configs = {}, {}
    for name, folder in folders.items():
        tensors, _ = read_tensors(found_file(folder / PEFT_FILE), allow_pickle)
        weights[name] = _bare_names({key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()})
        configs[name], fills = _read_peft_config(folder / PEFT_CONFIG, weights[name], lora_alpha)
        is_open = is_open or fills
    return Adapter(weights, configs), is_open


def _read_peft_config(file: Path, weights: Tensors, lora_alpha: float | None) -> tuple[Config, bool]:
    """Return the settings of a folder, and whether `lora_alpha` is needed for them."""
    try:
        options = adapter_settings.parse(file.read_text(encoding="utf-8"))
        kind = options.get("peft_type", "LORA")
        if kind in KINDS:
            # PEFT would put its own defaults in place of an alpha or a rank that is not there.
            alpha = adapter_settings.ALPHAS[kind]
            is_open = options.get(alpha) is None
            if is_open and lora_alpha is None:
                raise UserError(
                    f"{file} has no {alpha}, which says how strong the adapter is. Give --lora_alpha, that of its "
                    "training, or copy the folder again."
                )
            options |= {alpha: lora_alpha} if is_open else {}
            return adapter_settings.config_of(file, kind, options, by_module(weights)), is_open
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}. Copy the folder again.") from error
    raise UserError(f"{file.parent} holds a {str(kind)[:100]} adapter, not a LoRA, LoHa or LoKr. Give one of these.")


# --- single files ---


def _read_single_file(file: Path, lora_alpha: float | None, allow_pickle: bool) -> tuple[Adapter, bool]:
    tensors, metadata = read_tensors(file, allow_pickle)
    weights, alphas, strangers = _sort(file, tensors)
    if strangers:
        raise _stranger_error(file, tensors, strangers)
    _check_decomposed(file, tensors)
    try:
        settings = adapter_settings.parse(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        if not isinstance(settings, dict):
            raise TypeError(f"they are a {type(settings).__name__}")
        configs = {name: _config_from_metadata(file, name, part, settings) for name, part in weights.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"The adapter metadata of {file} is not readable: {first_line(error)}. Export the adapter again."
        ) from error
    is_open = False
    for name, part in weights.items():
        if configs[name] is None:
            configs[name], fills = _config_from_weights(file, name, part, alphas[name], lora_alpha)
            is_open = is_open or fills
    return Adapter(weights, configs), is_open


def _sort(file: Path, tensors: Tensors) -> tuple[dict[str, Tensors], dict[str, dict[str, float]], list[str]]:
    """Return the weights and the alphas of each component by PEFT's names, and the keys that are neither."""
    weights, alphas = {name: {} for name in ADAPTABLE}, {name: {} for name in ADAPTABLE}
    strangers, keys, twice = [], {}, []
    for key, tensor in tensors.items():
        component, _, name = key.partition(".")
        if component not in weights:
            component, name = _from_kohya(key) or (None, key)
            tensor = tensor if component is None else _from_kohya_shape(name, tensor)
        if component is None:
            strangers.append(key)
            continue
        first = keys.setdefault((component, _peft_name(component, name)), key)
        if first != key:
            twice.append(f"{first} a second time, as {key}")
        if name.endswith(".alpha"):
            alphas[component][name.removesuffix(".alpha")] = _number(tensor)
        else:
            weights[component][name] = tensor
    if twice:
        more = f", and {len(twice) - 1} more of this kind" if len(twice) > 1 else ""
        raise UserError(f"{file} holds {twice[0]}{more}. Export the adapter again with one of both.")
    weights = {name: _peft_names(name, _bare_names(part)) for name, part in weights.items() if part}
    return weights, alphas, strangers


def _from_kohya(key: str) -> tuple[str, str] | None:
    # ComfyUI's names have dots of their own: where the part begins is told by its name.
    match = re.fullmatch(r"(.+?)\.(alpha|dora_scale|lora_(?:down|up|A|B)\.weight|(?:hada|lokr)_\w+)", key)
    found = parse_kohya_name(match[1]) if match else None
    if found is None:
        return None
    component, module = found
    return component, f"{module}.{KOHYA_PARTS.get(match[2], match[2])}"


def _from_kohya_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return DoRA's vector in PEFT's shape; kohya's is (out, 1), and of a convolution (out, 1, 1, 1)."""
    if not name.endswith("lora_magnitude_vector") or tensor.ndim not in {2, 4} or tensor.shape[1] != 1:
        return tensor
    return tensor[:, 0] if tensor.ndim == 2 else tensor.transpose(0, 1)


def _check_decomposed(file: Path, tensors: Tensors) -> None:
    """Check that kohya's weight decompositions are DoRA as PEFT has it: of a LoRA, and over the outputs.

    Of as many inputs as outputs it would be taken for the other, where PEFT's shape of a convolution's is the same.
    """
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if part != "dora_scale":
            continue
        for kind, firsts in {"LoHa": ("hada_w1_a",), "LoKr": ("lokr_w1", "lokr_w1_a")}.items():
            if any(f"{module}.{first}" in tensors for first in firsts):
                raise UserError(
                    f"{file} is a {kind} with weight decomposition, as {key} shows, which is not read here. Give a "
                    f"{kind} without it, or a LoRA."
                )
        if tensor.ndim > 1 and tensor.shape[0] == 1 < tensor.shape[1]:
            raise UserError(
                f"{file} is a DoRA over the inputs, as {key} of {shown(tensor.shape)} shows, which is not read here. "
                "Give one over the outputs, or a LoRA."
            )


def _number(tensor: torch.Tensor) -> float:
    # The shortest number that rounds to this one: 0.1 comes back as 0.1.
    return float(str(tensor.float().numpy().reshape(-1)[0])) if tensor.numel() == 1 else math.nan


def _peft_names(component: str, weights: Tensors) -> Tensors:
    # diffusers' converters know older names of LoRAs too; a text encoder's would change names that are PEFT's already.
    if all(split_key(key) for key in weights):
        return weights
    if component == "unet":
        return convert_unet_state_dict_to_peft(weights)
    return convert_state_dict_to_peft(weights, original_type=StateDictType.DIFFUSERS)


def _peft_name(component: str, name: str) -> str:
    """Return the one name of a weight, which may have an older one, or in a text encoder one without text_model."""
    found = name if name.endswith(".alpha") else next(iter(_peft_names(component, {name: None})))
    return found.removeprefix("text_model.")


_PART = re.compile(r"\.(?:lora|hada|lokr|dora|alpha)")  # where the part of a module begins in its key


def _stranger_error(file: Path, tensors: Tensors, strangers: list[str]) -> UserError:
    if all(key.startswith(PEFT_PREFIX) for key in tensors):
        return UserError(f"{file} is a part of a PEFT folder. Give the folder, whose {PEFT_CONFIG} says its alpha.")
    some = ", ".join(repr(key) for key in strangers[:5]) + (", ..." if len(strangers) > 5 else "")
    if is_whole_model(tensors):
        return UserError(
            f"{file} is a whole model, or a part of one, and no adapter: it holds {next(iter(tensors))}. Give an SDXL "
            "adapter; `convert.py --extract_from` makes one from a tuned model."
        )
    family, is_one = guess_family(tensors), len(strangers) == 1
    is_sdxl = family in {None, SDXL}
    method = other_method(strangers) if is_sdxl else None
    holds = f"{file} holds {len(strangers)} {'key' if is_one else 'keys'} of {len(tensors)}"
    if is_sdxl and not method and not not_in_sdxl("unet", (_PART.split(key)[0] for key in strangers)):
        return UserError(
            f"{holds} without the component in front: {some}. Put unet. there, as diffusers' layout has it, or give "
            "the PEFT folder that they come from."
        )
    layouts = "diffusers', kohya's or ComfyUI's layout, or"
    what = f"Give an SDXL adapter: a file of {layouts} a PEFT folder."
    if method:
        what = f"They are of {method}, which is not read here. {what}"
    elif not is_sdxl or len(strangers) == len(tensors) and family is None:
        what = f"It looks as if made for {family or 'another model family'}. {what}"
    elif len(strangers) == len(tensors):
        what = f"Give it in {layouts} as a PEFT folder."
    else:
        what = f"Export the adapter again without {'it' if is_one else 'them'}."
    return UserError(f"{holds} that no layout of an SDXL adapter has: {some}. {what}")


def _config_from_metadata(file: Path, component: str, weights: Tensors, metadata: dict) -> LoraConfig | None:
    prefix = f"{component}."
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    options = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    options = {key: value for key, value in options.items() if key in known}
    if "lora_alpha" not in options:
        return None
    return adapter_settings.config_of(file, "LORA", options, by_module(weights))


def _config_from_weights(
    file: Path, component: str, weights: Tensors, alphas: dict[str, float], lora_alpha: float | None
) -> tuple[Config, bool]:
    """Return the settings that the weights show, and whether `lora_alpha` is needed for them."""
    wrong = {module: alpha for module, alpha in alphas.items() if not 0 < alpha < math.inf}
    if wrong:
        module, alpha = next(iter(wrong.items()))
        raise UserError(f"{file} gives {module} the alpha {alpha:g}, not a positive number. Export the adapter again.")
    if alone := sorted(alphas.keys() - by_module(weights).keys()):
        raise UserError(
            f"{file} has the alpha of {len(alone)} modules without their weights, such as {alone[0]}. A part of it is "
            "missing: export the adapter again."
        )
    is_open = modules_without_alpha(weights, alphas)
    try:
        config = infer_config(weights, alphas, lora_alpha)
    except WithoutAlphaError as error:
        family = guess_family(weights)
        if family not in {None, SDXL}:
            raise UserError(f"{file} looks as if made for {family}. Give an SDXL adapter.") from error
        modules = len(by_module(weights))
        of_which = f" for {len(is_open)} of {modules} modules" if len(is_open) < modules else ""
        raise UserError(
            f"{file} does not say its alpha{of_which}. Either it was trained at alpha = rank = {error.rank} "
            "(strength 1), as files without it often are, or at an alpha that is unknown here. Give --lora_alpha "
            f"{error.rank} for the first reading, or the alpha of its training."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} cannot be used: {first_line(error)}. Give a LoRA.") from error
    if config is None:
        raise _without_weights(file, [f"{component}.{key}" for key in weights if split_key(key) is None])
    return config, bool(is_open)

"""Read an adapter that is one file, in the layout of diffusers, of kohya (which AUTOMATIC1111 reads) or of ComfyUI."""

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
    PEFT_CONFIG,
    PEFT_PREFIX,
    Adapter,
    Config,
    WithoutAlphaError,
    by_module,
    infer_config,
    modules_without_alpha,
    shown,
    split_key,
)
from rasengan.families import SDXL, guess_family, is_whole_model, not_in_sdxl, other_method
from rasengan.naming import KOHYA_PARTS, parse_kohya_name
from rasengan.tensor_files import read_tensors


Tensors = dict[str, torch.Tensor]


def read_single_file(file: Path, lora_alpha: float | None, allow_pickle: bool) -> tuple[Adapter, bool]:
    """Return the adapter of a file, and whether it leaves an alpha open, which is then `lora_alpha`.

    Raises:
        UserError: as `adapter_reader.read_adapter`.
    """
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
    weights = {name: _peft_names(name, bare_names(part)) for name, part in weights.items() if part}
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
        raise without_weights(file, [f"{component}.{key}" for key in weights if split_key(key) is None])
    return config, bool(is_open)


# --- what PEFT folders have too ---


def without_weights(path: Path, others: Collection[str] = ()) -> UserError:
    """Return the error for an adapter that holds none; `others` are the keys that it has instead."""
    but = f", but {len(others)} of other names, such as {next(iter(others))}" if others else ""
    return UserError(f"{path} holds no LoRA weights{but}. Give the adapter of a training, or export it again.")


_NAMED_PART = re.compile(r"(.+\.(?:lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$)([^.]+)(\.weight)?")


def bare_names(weights: Tensors) -> Tensors:
    """Return weights without the name of their adapter, as a model under PEFT has it, if all have one and the same."""
    named = {key: _NAMED_PART.fullmatch(key) for key in weights}
    if all(named.values()) and len({match[2] for match in named.values()}) == 1:
        weights = {match[1] + (match[3] or ""): weights[key] for key, match in named.items()}
    # Some versions of PEFT keep the name of the module that holds DoRA's vector.
    return {key.replace("magnitude_vector.weight", "magnitude_vector"): tensor for key, tensor in weights.items()}

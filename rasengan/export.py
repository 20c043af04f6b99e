"""Adapter files: write them, verify them, and read them.

Weights are named as PEFT names them, without the adapter's name: `MODULE.lora_A.weight` (rank, in) and
`MODULE.lora_B.weight` (out, rank), fp32.
"""

import copy
import dataclasses
import json
import math
import re
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils.state_dict_utils import StateDictType
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from rasengan import UserError, first_line
from rasengan.files import give_default_mode, sync


DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}
ADAPTABLE = ("unet", "text_encoder", "text_encoder_2")
# What a merge reads of a LoRA's settings, beside r and lora_alpha.
SETTINGS = {"target_modules": str | list, "exclude_modules": str | list, "rank_pattern": dict, "alpha_pattern": dict}


class Adapter(NamedTuple):
    """What an adapter file holds, for each component that it adapts."""

    weights: dict[str, dict[str, torch.Tensor]]
    configs: dict[str, LoraConfig]


# --- writing ---


def adapter_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's weights by name; they share the memory of the live ones."""
    return get_peft_model_state_dict(model)


def fit_names(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights under the model's names: only some versions of transformers begin them with text_model."""
    bare = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    return {f"text_model.{key}": tensor for key, tensor in bare.items()} if hasattr(model, "text_model") else bare


def live_adapter(models: dict[str, torch.nn.Module]) -> Adapter:
    """Return the adapters of some components by name, the weights by their names in diffusers' files.

    The weights share the memory of the live ones.
    """
    weights, configs = {}, {}
    for name, model in models.items():
        # Other programs know the text encoders' modules under text_model., as older transformers named them.
        prefix = "" if name == "unet" or hasattr(model, "text_model") else "text_model."
        weights[name] = {prefix + key: tensor.detach() for key, tensor in adapter_weights(model).items()}
        configs[name] = _config_of(model)
    return Adapter(weights, configs)


class AdapterLayout(NamedTuple):
    """Where the weights of some components' adapters lie in the flat parameter: by name, first element and shape."""

    places: dict[str, dict[str, tuple[int, torch.Size]]]
    configs: dict[str, LoraConfig]

    @classmethod
    def of(cls, models: dict[str, torch.nn.Module], flat: torch.nn.Parameter) -> "AdapterLayout":
        """Return the layout of the adapted components by name, whose adapters' weights are views of `flat`."""
        weights, configs = live_adapter(models)
        places = {
            component: {
                name: ((weight.data_ptr() - flat.data_ptr()) // flat.element_size(), weight.shape)
                for name, weight in named.items()
            }
            for component, named in weights.items()
        }
        return cls(places, configs)

    def adapter(self, values: torch.Tensor) -> Adapter:
        """Return the adapters with other values in the flat parameter's place, as views of them."""
        weights = {
            component: {name: values[start : start + shape.numel()].view(shape) for name, (start, shape) in at.items()}
            for component, at in self.places.items()
        }
        return Adapter(weights, self.configs)


def save_diffusers(directory: Path, models: dict[str, torch.nn.Module]) -> None:
    """Write `pytorch_lora_weights.safetensors` of the adapted components by name, as `write_diffusers` does."""
    write_diffusers(directory, live_adapter(models))


def write_diffusers(directory: Path, adapter: Adapter) -> None:
    """Write `pytorch_lora_weights.safetensors` as diffusers lays it out, with each LoRA's alpha in its metadata.

    Without the metadata a reload would run at alpha = rank. Equal weights give a byte-identical file.

    Args:
        directory: made if missing.
        adapter: of the unet and perhaps the text encoders, as `live_adapter` returns it.
    """
    options = {}
    for name, weights in adapter.weights.items():
        weights = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        options[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(weights)
        options[f"{name}_lora_adapter_metadata"] = adapter.configs[name].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(directory, **options)
    file = directory / DIFFUSERS_FILE
    file.write_bytes(_with_sorted_metadata(file.read_bytes()))


def _with_sorted_metadata(content: bytes) -> bytes:
    # safetensors writes its metadata in another order each time, which would make equal runs write different files.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def save_peft(directory: Path, models: dict[str, torch.nn.Module]) -> None:
    """Write the UNet's LoRA as a PEFT folder, and each text encoder's as one inside it, named after the encoder."""
    for name, model in models.items():
        folder = directory if name == "unet" else directory / name
        weights = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_weights(model).items()}
        write_peft(folder, weights, _config_of(model))


def _config_of(model: torch.nn.Module) -> LoraConfig:
    config = copy.deepcopy(model.peft_config["default"])
    # A set, whose order follows the hash seed, would make equal runs write different files.
    config.target_modules = sorted(config.target_modules)
    config.inference_mode = True
    config.base_model_name_or_path = None
    return config


def write_peft(folder: Path, weights: dict[str, torch.Tensor], config: LoraConfig) -> None:
    """Write weights of one component, by name, and their configuration as a PEFT folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # PeftModel.from_pretrained only warns about keys without this prefix, and leaves lora_B at zero.
    save_file({PEFT_PREFIX + k: v for k, v in weights.items()}, folder / PEFT_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def check_finite(models: dict[str, torch.nn.Module], last_good: str = "") -> None:
    """Check that the adapters can be saved over good ones.

    Args:
        models: the adapted components by name.
        last_good: the name of the last checkpoint; empty where there is none.

    Raises:
        UserError: a weight is not finite.
    """
    go_on = f"resume from {last_good}, the last good checkpoint" if last_good else "start again"
    for name, model in models.items():
        if not all(torch.isfinite(weight).all() for weight in adapter_weights(model).values()):
            raise UserError(
                f"The trained {name} adapter has non-finite weights: the run diverged. Nothing was overwritten; lower "
                f"--learning_rate, and {go_on}."
            )


def publish(directory: Path, models: dict[str, torch.nn.Module], last_good: str = "") -> None:
    """Write both kinds of adapter into a folder, `pytorch_lora_weights.safetensors` and `peft/`, and verify them.

    Each file appears under its name whole, and in place of an older one.

    Args:
        directory: it exists.
        models: the adapted components by name.
        last_good: the name of the last checkpoint, for the error; empty where there is none.

    Raises:
        UserError: the adapter is not finite, or the folder cannot be written.
        RuntimeError: reading back gave other weights.
    """
    check_finite(models, last_good)
    try:
        _publish(directory, models)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error).rstrip(".")
        go_on = f"go on from {last_good} with --resume_from_checkpoint latest" if last_good else "run it again"
        raise UserError(f"The adapter cannot be written to {directory}: {reason}. Make room, and {go_on}.") from error
    verify_saved(directory / DIFFUSERS_FILE, models)
    verify_saved(directory / "peft", models)


def _publish(directory: Path, models: dict[str, torch.nn.Module]) -> None:
    with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as unfinished:
        save_diffusers(Path(unfinished), models)
        save_peft(Path(unfinished) / "peft", models)
        for file in sorted(path for path in Path(unfinished).rglob("*") if path.is_file()):
            final = directory / file.relative_to(unfinished)
            final.parent.mkdir(parents=True, exist_ok=True)
            give_default_mode(file)
            sync(file)
            file.replace(final)


def verify_saved(path: Path, models: dict[str, torch.nn.Module]) -> None:
    """Read an adapter back, and compare it with the live weights bit for bit, alpha and rank included.

    Raises:
        RuntimeError: what is on disk is not what was trained.
    """
    adapter = read_adapter(path)
    for name, model in models.items():
        live, saved = adapter_weights(model), fit_names(adapter.weights.get(name, {}), model)
        same = live.keys() == saved.keys() and all(torch.equal(live[k].cpu(), saved[k]) for k in live)
        config, expected = adapter.configs.get(name), model.peft_config["default"]
        if not same or (config.r, config.lora_alpha) != (expected.r, expected.lora_alpha):
            raise RuntimeError(
                f"{path} does not hold the trained {name} adapter: reading it back gave other weights. The disk may "
                "be full or damaged; the last checkpoint holds the weights."
            )


# --- reading ---


def read_adapter(path: Path, lora_alpha: float | None = None, allow_pickle: bool = False) -> Adapter:
    """Read an adapter from a safetensors file, a PEFT folder, or a folder with `pytorch_lora_weights.safetensors`.

    Args:
        path: a folder with an `adapter_config.json` is read as PEFT's; every `checkpoint-N` is one of the last kind.
        lora_alpha: what alpha was in training, for a file that does not say.
        allow_pickle: read a `.bin`, `.ckpt`, `.pt` or `.pth` too, tensors alone.

    Raises:
        UserError: there is no adapter, it is a pickle, damaged, of another layout, without alpha, or with another than
            `lora_alpha`.
    """
    adapter = _read_adapter(path, lora_alpha, allow_pickle)
    if not any(adapter.weights.values()):
        raise _without_weights(path)
    for name, config in adapter.configs.items():
        if lora_alpha not in {None, config.lora_alpha}:
            raise UserError(
                f"--lora_alpha is {lora_alpha:g}, but {path} says {config.lora_alpha:g} for the {name}. Drop the "
                "flag: --lora_scale is what changes the strength."
            )
    return adapter


def _without_weights(path: Path) -> UserError:
    return UserError(f"{path} holds no LoRA weights. Give the adapter of a training, or export it again.")


def _read_adapter(path: Path, lora_alpha: float | None, allow_pickle: bool) -> Adapter:
    if (path / "adapter_config.json").is_file():
        folders = {"unet": path} | {name: path / name for name in ADAPTABLE[1:] if (path / name).is_dir()}
        weights, configs = {}, {}
        for name, folder in folders.items():
            weights[name], _ = _read_file(_there(folder / PEFT_FILE), allow_pickle)
            weights[name] = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in weights[name].items()}
            configs[name] = _completed(_read_peft_config(folder), weights[name])
        return Adapter(weights, configs)

    file = _there(path / DIFFUSERS_FILE) if path.is_dir() else path
    tensors, metadata = _read_file(file, allow_pickle)
    weights = {name: {} for name in ADAPTABLE}
    strangers = []
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component in weights:
            weights[component][rest] = tensor
        else:
            strangers.append(key)
    if strangers:
        raise UserError(
            f"{file} holds {len(strangers)} keys that are not of diffusers' layout, such as {strangers[0]!r}. "
            "Give a file whose keys begin with unet., text_encoder. or text_encoder_2., or a PEFT folder."
        )
    weights = {name: _peft_names(name, part) for name, part in weights.items() if part}
    try:
        metadata = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
        if not isinstance(metadata, dict):
            raise TypeError(f"they are a {type(metadata).__name__}")
        configs = {name: _config_from(file, name, part, metadata, lora_alpha) for name, part in weights.items()}
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"The adapter metadata of {file} is not readable: {error}. Export the adapter again."
        ) from error
    return Adapter(weights, configs)


def _peft_names(component: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if component == "unet":
        return convert_unet_state_dict_to_peft(weights)
    return convert_state_dict_to_peft(weights, original_type=StateDictType.DIFFUSERS)


def _there(file: Path) -> Path:
    """Return the file, or the pickle that stands in its place."""
    pickles = [file.with_suffix(suffix) for suffix in sorted(PICKLES)]
    return next((path for path in (file, *pickles) if path.is_file()), file)


def _read_pickle(file: Path, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not allow_pickle:
        raise UserError(
            f"{file} is a pickle, which can run what a stranger wrote into it. Give the adapter as safetensors, or "
            "--allow_pickle, which reads tensors alone from it."
        )
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise TypeError("it holds more than tensors by name")
    except UnpicklingError as error:  # whose text advises to load it all the same
        raise UserError(
            f"{file} holds more than tensors, and is not read. Give the adapter as safetensors."
        ) from error
    except Exception as error:  # torch.load raises half a dozen unrelated classes for what it does not know
        reason = first_line(error).rstrip(".")
        raise UserError(f"{file} cannot be read: {reason}. Give the adapter as safetensors.") from error
    return tensors


def _read_file(file: Path, allow_pickle: bool) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if file.is_file() and file.suffix in PICKLES:
        return _read_pickle(file, allow_pickle), {}
    if not file.is_file():
        raise UserError(
            f"There is no adapter at {file}. Give --lora_weights a .safetensors file, a PEFT folder, or a folder with "
            f"{DIFFUSERS_FILE}."
        )
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}). Copy or download it again.") from error


def _check_values(options: dict) -> None:
    for name, kind in {"r": int, "lora_alpha": int | float}.items():
        value = options.get(name)
        if not isinstance(value, kind) or value is True or not 0 < value < math.inf:
            raise TypeError(f"{name} is {value!r}, not a positive number")
    for name, kind in SETTINGS.items():
        value = options.get(name)
        names = value if isinstance(value, list | dict) else []
        if not isinstance(value, kind | None) or not all(isinstance(item, str) for item in names):
            raise TypeError(f"{name} is {value!r}, not names")
        for pattern in [value] if isinstance(value, str) else [*names] if isinstance(value, dict) else []:
            try:
                re.compile(pattern)
            except re.error as error:
                raise TypeError(f"{name} has {pattern!r}, no regular expression: {error}") from error
        numbers = value.values() if isinstance(value, dict) else []
        if not all(isinstance(number, int | float) and number is not True for number in numbers):
            raise TypeError(f"{name} is {value!r}, not names with numbers")
    layers = options.get("layers_to_transform") or []
    if not all(isinstance(layer, int) for layer in (layers if isinstance(layers, list) else [layers])):
        raise TypeError(f"layers_to_transform is {layers!r}, not whole numbers")


def _read_peft_config(folder: Path) -> LoraConfig:
    file = folder / "adapter_config.json"
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        kind = options.get("peft_type", "LORA")
        if kind == "LORA":
            # PEFT would put its own defaults in place of an alpha or a rank that is not there.
            _check_values(options)
            return LoraConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}. Copy the folder again.") from error
    raise UserError(f"{folder} holds a {kind} adapter, not a LoRA. Give a LoRA.")


def _completed(config: LoraConfig, weights: dict[str, torch.Tensor]) -> LoraConfig:
    # Without targets PEFT would adapt nothing; the keys say what was adapted.
    if not config.target_modules:
        config.target_modules = sorted({key.rpartition(".lora_")[0] for key in weights})
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    return config


def _config_from(
    file: Path, component: str, weights: dict[str, torch.Tensor], metadata: dict, lora_alpha: float | None
) -> LoraConfig:
    prefix = f"{component}."
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    options = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    options = {key: value for key, value in options.items() if key in known}
    if "lora_alpha" in options:
        _check_values(options)
        try:
            return _completed(LoraConfig(**options), weights)
        except ValueError as error:
            raise TypeError(first_line(error)) from error
    matrices = {key.rpartition(".lora_")[0]: w for key, w in weights.items() if ".lora_A." in key and w.ndim == 2}
    ranks = {module: len(matrix) for module, matrix in matrices.items() if len(matrix)}
    if not ranks:
        raise _without_weights(file)
    rank = max(ranks.values(), key=list(ranks.values()).count)
    if lora_alpha is None:
        raise UserError(
            f"{file} does not say its alpha. Either it was trained at alpha = rank = {rank} (strength 1), as files "
            f"without it often are, or at an alpha that is unknown here. Give --lora_alpha {rank} for the first "
            "reading, or the alpha of its training."
        )
    modules = sorted({key.rpartition(".lora_")[0] for key in weights})
    rank_pattern = {re.escape(module): other for module, other in ranks.items() if other != rank}
    return LoraConfig(r=rank, lora_alpha=lora_alpha, target_modules=modules, rank_pattern=rank_pattern)

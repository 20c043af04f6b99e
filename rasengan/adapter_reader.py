"""Read an adapter of any layout: a folder of PEFT's, or a file as `adapter_file` has it."""

import re
from pathlib import Path

import torch

from rasengan import UserError, adapter_settings, first_line
from rasengan.adapter_file import bare_names, read_single_file, without_weights
from rasengan.adapters import (
    ADAPTABLE,
    DIFFUSERS_FILE,
    KINDS,
    PEFT_CONFIG,
    PEFT_FILE,
    PEFT_PREFIX,
    Adapter,
    Config,
    by_module,
    default_alpha,
    split_key,
    what_is_malformed,
)
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
        if path.is_dir() and not file.is_file() and (steps := _steps_saved(path)):
            raise UserError(
                f"There is no adapter in {path}, since that run has not ended. Its newest checkpoint is "
                f"{path / f'checkpoint-{max(steps)}'}: give that, or let the run end."
            )
        adapter, is_open = read_single_file(file, lora_alpha, allow_pickle)
    if not any(adapter.weights.values()):
        raise without_weights(path)
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


def _steps_saved(run: Path) -> list[int]:
    names = (re.fullmatch(r"checkpoint-(\d{1,18})", path.name, re.ASCII) for path in run.iterdir())
    return [int(name[1]) for name in names if name]


def is_peft_folder(path: Path) -> bool:
    """Say whether a folder is one of PEFT, perhaps with text encoders in folders of their own."""
    return any((folder / PEFT_CONFIG).is_file() for folder in _peft_folders(path).values())


def _peft_folders(path: Path) -> dict[str, Path]:
    return {"unet": path} | {name: path / name for name in ADAPTABLE[1:] if (path / name).is_dir()}


# --- PEFT folders ---


def _read_peft_folder(path: Path, lora_alpha: float | None, allow_pickle: bool) -> tuple[Adapter, bool]:
    folders, is_open = _peft_folders(path), False
    if not (path / PEFT_CONFIG).is_file():  # text encoders alone
        del folders["unet"]
    weights, configs = {}, {}
    for name, folder in folders.items():
        tensors, _ = read_tensors(found_file(folder / PEFT_FILE), allow_pickle)
        weights[name] = bare_names({key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()})
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

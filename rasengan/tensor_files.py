"""The tensors of an adapter's file: safetensors, or, where that is allowed, a pickle of nothing else."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rasengan import UserError, first_line


PICKLES = {".bin", ".ckpt", ".pt", ".pth"}

Tensors = dict[str, torch.Tensor]


def found_file(file: Path) -> Path:
    """Return the file, or the pickle that stands in its place."""
    pickles = [file.with_suffix(suffix) for suffix in sorted(PICKLES)]
    return next((path for path in (file, *pickles) if path.is_file()), file)


def read_tensors(file: Path, allow_pickle: bool) -> tuple[Tensors, dict[str, str]]:
    """Return an adapter file's tensors, on the CPU, and its metadata.

    Raises:
        UserError: it is not there, damaged, or a pickle that is not allowed or holds more than tensors.
    """
    if file.is_file() and file.suffix in PICKLES:
        return _read_pickle(file, allow_pickle), {}
    if not file.is_file():
        raise UserError(
            f"There is no adapter at {file}. Give by --lora_weights, --lora or --input a .safetensors file, a run's "
            "--output_dir, a checkpoint-N, a PEFT folder, or a hub id."
        )
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
        return load_file(file), metadata
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}). Copy or download it again.") from error


def _read_pickle(file: Path, allow_pickle: bool) -> Tensors:
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

"""Files of tensors: of a model's weights, and of an adapter, which may be a pickle of nothing else if allowed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from rasengan import UserError, first_line
from rasengan.files import write_failure


SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "weight_scale_2")  # of weights in 8 bits and fewer
PICKLES = {".bin", ".ckpt", ".pt", ".pth"}

Tensors = dict[str, torch.Tensor]


# --- of a model ---


def stored(file: Path) -> dict[str, tuple[str, torch.Size]]:
    """Return the dtype, as safetensors names it, and the shape of each tensor in a file of weights.

    Raises:
        UserError: it cannot be read.
    """
    with opened(file) as content:
        slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), torch.Size(part.get_shape())) for key, part in slices.items()}


def check_plain(place: Path, names: Iterable[str]) -> None:
    """Check that the tensors of a model are its weights as they are, and of SDXL's kind.

    Raises:
        UserError: they are to be multiplied by others, or are of an EDM model.
    """
    for name in names:
        if name.startswith("edm_"):
            raise UserError(
                f"{place} is an EDM model, as {name} says, not one of SDXL's kind: its steps are others. Give another."
            )
        if name.endswith(SCALES):
            raise UserError(
                f"{place} holds weights that are to be multiplied by others, such as {name}, which is not done here. "
                "Give a model in fp16, bf16 or fp32."
            )


@contextmanager
def opened(file: Path) -> Iterator[safe_open]:
    """Open a file of weights.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {write_failure(error)}. Give a whole .safetensors file.") from error


# --- of an adapter ---


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
            f"There is no adapter at {file}. Give a .safetensors file, a run's folder, "
            "a checkpoint-N, a PEFT folder, or a hub id."
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

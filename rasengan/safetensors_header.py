"""The header of a safetensors file: the dtype, the shape and the place of each tensor, and the metadata.

Source: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER_BYTES = 100 * 2**20  # of which safetensors takes no more either


def read_header(file: BinaryIO) -> tuple[dict, int]:
    """Return what a file's header says, by name, and how many bytes it takes, after the eight that say so.

    Raises:
        ValueError: it is no JSON.
    """
    size = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(min(size, MOST_HEADER_BYTES))), size


def make_header(
    planned: Mapping[str, tuple[torch.dtype, torch.Size]],
) -> tuple[bytes, dict[str, int], int]:
    """Return a file's beginning, where in the file each planned tensor begins, and the file's size, in bytes."""
    entries, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for key, (dtype, shape) in planned.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        places[key] = begin
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + begin for key, begin in places.items()}, len(header) + end


def sort_metadata(file: Path) -> None:
    """Sort a file's metadata, whose order changes from one writing to the next.

    In place: a copy of all that follows the header would keep the interpreter, and with it the training, waiting.
    """
    with open(file, "r+b") as content:
        header, size = read_header(content)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # As compact as it was, with characters as they were: so it has the room that it had.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{file}: the sorted header takes {len(text)} bytes of {size}")
        content.seek(8)
        content.write(text.ljust(size))

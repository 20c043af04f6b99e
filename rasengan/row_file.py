"""Rows of a cache's file, read one at a time."""

import json
from pathlib import Path

import torch


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
MOST_HEADER_BYTES = 100 * 2**20  # of which safetensors takes no more either


class RowFile:
    """A safetensors file whose tensors all have a row for each item, read by single rows.

    safetensors' own ways either map the file into memory, so that a disk that goes away, or a file that is cut off
    meanwhile, ends the process by SIGBUS without a word; or read whole tensors. No descriptor stays open.
    Source: https://github.com/huggingface/safetensors#format.
    """

    def __init__(self, path: Path):
        """Read the file's header.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, MOST_HEADER_BYTES))
        self.path, self.parts = path, {}
        try:
            for name, about in json.loads(header).items():
                if name != "__metadata__":
                    count, *shape = about["shape"]
                    begin, end = about["data_offsets"]
                    self.parts[name] = (DTYPES[about["dtype"]], shape, 8 + size + begin, (end - begin) // count)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError("its header is damaged") from error

    def read(self, row: int) -> dict[str, torch.Tensor]:
        """Return a row of each tensor.

        Raises:
            OSError: it cannot be read.
            ValueError: the file ends before it.
        """
        found = {}
        with open(self.path, "rb", buffering=0) as file:
            for name, (dtype, shape, start, size) in self.parts.items():
                content = bytearray(size)
                file.seek(start + row * size)
                if file.readinto(content) != size:
                    raise ValueError("it was cut off")
                found[name] = torch.frombuffer(content, dtype=dtype).view(shape)
        return found

"""Rows of a cache's file, read one at a time."""

from pathlib import Path

import torch

from rasengan.safetensors_header import DTYPES, read_header


class RowFile:
    """A safetensors file whose tensors all have a row for each item, read by single rows.

    safetensors' own ways either map the file into memory, so that a disk that goes away, or a file that is cut off
    meanwhile, ends the process by SIGBUS without a word; or read whole tensors. No descriptor stays open.
    """

    def __init__(self, path: Path):
        """Read the file's header.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        self.path, self.parts = path, {}
        try:
            with open(path, "rb") as file:
                header, size = read_header(file)
            for name, about in header.items():
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

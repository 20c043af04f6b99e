"""Files of drawn pictures: their names, what each was made from, and how they are written."""

import io
import itertools
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, PngImagePlugin

from rasengan.files import write_atomically, write_if_free


MOST_PENDING = 8  # pictures that are not written yet


class PictureWriter:
    """Writes pictures while others are drawn; leaving it waits for all of them, and raises what kept one from it."""

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1, thread_name_prefix="picture"), deque()

    def __enter__(self) -> "PictureWriter":
        return self

    def write(self, path: Path, image: Image.Image, about: dict[str, object]) -> None:
        """Begin to write a picture, as `save_beside` does; waits where many are not written yet.

        Raises:
            OSError: an earlier one could not be written.
        """
        self.pending.append(self.pool.submit(save_beside, path, image, about))
        while len(self.pending) > MOST_PENDING:
            self.pending.popleft().result()

    def __exit__(self, error_type, *_) -> None:
        self.pool.shutdown()
        if error_type is None:
            for future in self.pending:
                future.result()


def picture_name(prompt: str, seed: int, kind: str) -> str:
    """Return a file name for a picture that tells it from others; what a prompt has besides letters is left out."""
    prompt = os.fsencode(re.sub(r"\W+", "-", prompt).strip("-")[:40])[:80].decode(errors="ignore")
    kind = os.fsencode(slug(kind))[-80:].decode(errors="ignore")  # the end, which has the scale
    return f"{seed}-{prompt}-{kind}.png"


def slug(kind: str) -> str:
    """Return what a file name has of a kind of picture; a scale keeps its sign."""
    return re.sub(r"[^\w.]+", "-", re.sub(r" -(?=[\d.])", " minus ", kind))


def place_of(path: Path, about: dict[str, object]) -> Path:
    """Return where a picture is, or is to be written: the first free name where none is made from the same.

    Args:
        path: that it has in an empty folder; beside pictures that were made otherwise its name ends in -2, -3, ...
        about: what it is made from, as `save_png` takes it.
    """
    for number in itertools.count(1):
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not os.path.lexists(file) or read_about(file) == _as_text(about):
            return file


def _as_text(about: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in about.items()}


def read_about(path: Path) -> dict[str, str]:
    """Return what a picture was made from, as `save_png` wrote it; nothing of a file that it did not write."""
    try:
        with Image.open(path) as image:
            return {name: value for name, value in image.info.items() if isinstance(value, str)}
    except Exception:  # Pillow's plugins raise what they like
        return {}


def save_png(path: Path, image: Image.Image, about: dict[str, object] | None = None) -> None:
    """Write a picture whole or not at all, with what it was made from in its metadata, as text by name."""
    write_atomically(path, _as_png(image, about or {}))


def save_beside(path: Path, image: Image.Image, about: dict[str, object]) -> Path:
    """Write a picture as `save_png` does, over none that was made otherwise, and return its `place_of`.

    The name is taken when the picture is whole: runs that draw into one folder at the same time keep theirs apart.
    """
    content = _as_png(image, about)
    while not write_if_free(file := place_of(path, about), content):
        if read_about(file) == _as_text(about):
            write_atomically(file, content)
            break
    return file


def _as_png(image: Image.Image, about: dict[str, object]) -> bytes:
    metadata = PngImagePlugin.PngInfo()
    for name, value in about.items():
        metadata.add_itxt(name, str(value))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=metadata)
    return file.getvalue()

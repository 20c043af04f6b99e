"""Look at every picture of a data set as training would see it, and at what could not be trained on."""

import io
import os
import re
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import datasets
import numpy as np
from PIL import ExifTags, Image

from rasengan import UserError, captions, data, first_line, imaging, pages
from rasengan.imaging import Picture
from rasengan.near_duplicates import Fingerprint, fingerprint


class Look(NamedTuple):
    """What a picture looks like."""

    kind: str  # format and mode of the file
    is_turned: bool  # by its EXIF orientation
    fingerprint: Fingerprint
    thumbnail: bytes  # of its crop, a JPEG; empty where it is not shown


class Usable(NamedTuple):
    """What can be trained on, row by row, and the captions that are none."""

    rows: list[int]
    pictures: list[Picture]
    captions: list[list[str]]
    bad_captions: list[tuple[str, str]]  # the picture's name, and what is wrong


def unlisted_files(directory: str, column: datasets.Column) -> tuple[list[str], list[str]]:
    """Return the files of a folder that no row of its data set has: pictures, and those of no known format.

    Args:
        directory: the folder.
        column: of its pictures, undecoded.
    """
    named = {os.path.abspath(record["path"]) for record in column if record and record["path"]}
    files = sorted(path for path in data.list_files(directory) if os.path.abspath(path) not in named)
    pictures = [path for path in files if imaging.is_picture_name(path)]
    return [str(path) for path in pictures], [str(path) for path in captions.unknown_files(files)]


def unread_captions(directory: str) -> list[str]:
    """Return the .txt of a folder that stand beside no picture, or beside pictures that have metadata."""
    files = data.list_files(directory)
    beside = captions.find_beside(files)
    return [str(file) for file in (beside.strays if beside else captions.hidden_by_metadata(files))]


def refusal(dataset: datasets.Dataset, pictures: list[Picture], caption_column: str, skip: bool) -> str:
    """Return the line by which training refuses these pictures and captions; empty where it takes them."""
    try:
        dataset, pictures = data.leave_out_broken(dataset, pictures, skip)
        captions.read_captions(dataset, caption_column, pictures)
    except UserError as error:
        return re.sub(":$", ".", first_line(error))  # after the colon training lists the pictures
    return ""


def usable_rows(dataset: datasets.Dataset, caption_column: str, pictures: list[Picture]) -> Usable:
    """Return the rows whose picture can be decoded, and whose captions are texts."""
    usable, column = Usable([], [], [], []), dataset[caption_column][:]
    for row, (fault, picture) in enumerate(zip(captions.faults(dataset, caption_column), pictures, strict=True)):
        if picture.error:
            continue
        if fault:
            usable.bad_captions.append((picture.name, fault))
        else:
            usable.rows.append(row)
            usable.pictures.append(picture)
            usable.captions.append(captions.texts_of(column[row]))
    return usable


def spread(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers below `count`, evenly spread."""
    return sorted({number * count // most for number in range(most)}) if count > most else list(range(count))


def look_at_pictures(
    column: datasets.Column,
    sizes: list[imaging.Size],
    interpolation: str,
    shown: Collection[int],
    on_picture: Callable[[], object] = lambda: None,
) -> list[Look]:
    """Decode every picture; thumbnails are kept of those that are shown, so that memory hardly grows with the others.

    Args:
        column: undecoded, of pictures that can be decoded.
        sizes: `imaging.crop_sizes`.
        interpolation: one of `imaging.INTERPOLATIONS`.
        shown: the rows to keep a thumbnail of.
        on_picture: called after each picture.
    """
    with ThreadPoolExecutor() as pool:
        look = partial(_look, column, sizes, interpolation, frozenset(shown), on_picture)
        return list(pool.map(look, range(len(column))))


def _look(
    column, sizes: list[imaging.Size], interpolation: str, shown: frozenset, on_picture: Callable, row: int
) -> Look:
    content = imaging.read_bytes(column[row])
    with Image.open(io.BytesIO(content)) as stored:
        kind = f"{stored.format} {stored.mode}"
        is_turned = stored.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    image = imaging.decode(content)
    thumbnail = pages.as_jpeg(center_crop(image, sizes, interpolation)) if row in shown else b""
    on_picture()
    return Look(kind, is_turned, fingerprint(image), thumbnail)


def center_crop(image: Image.Image, sizes: list[imaging.Size], interpolation: str) -> Image.Image:
    """Return the picture as training crops it at its center, to one of `imaging.crop_sizes`."""
    crop = imaging.crop_size(image.height, image.width, sizes)
    top_left = imaging.center_crop_top_left(imaging.resized_size(image.height, image.width, crop), crop)
    pixels = imaging.crop_pixels(image, crop, interpolation, False, top_left)
    levels = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(levels.numpy()))

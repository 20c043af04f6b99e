"""Picture files: look at them, decode them, and crop them to the sizes that are trained on."""

import errno
import hashlib
import io
import json
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from rasengan import UserError
from rasengan.files import read_json_or_empty, write_atomically


# Which a picture of too many pixels is refused for here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Size = tuple[int, int]  # height and width, in px

# torchvision's names, which diffusers' --image_interpolation_mode uses, for Pillow's filters.
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,
}
# Where Pillow begins to warn of a decompression bomb: 9,400 px square.
MOST_PIXELS = Image.MAX_IMAGE_PIXELS
MOST_BYTES = 2**30  # of a file: more than as many pixels take in any format
PROGRAM = "EPS"  # PostScript, under any file name, which Ghostscript would run where it is installed
# Formats whose pictures of 16 bits Pillow opens as 32 bits.
SIXTEEN_BITS = {"PPM", "PNG"}
# A strip of a few bytes would be scaled to gigabytes, since it is made as wide as its crop before it is cropped.
MOST_ASPECT = 100


# Of what is remembered of pictures. Another is needed once fewer can be used than before: others are not read.
FORMAT = 1


class Picture(NamedTuple):
    """What is known of a picture file without decoding it again."""

    name: str
    digest: str
    height_px: int  # upright, by its EXIF orientation
    width_px: int
    error: str | None  # why it cannot be decoded
    position: int = 0  # in the data set, before any was left out


class PictureChanged(UserError):
    """A picture's file is not what it was when the run looked at it."""


# --- checking and decoding pictures ---


def is_picture_name(file: Path) -> bool:
    """Say whether a file's name ends as those of pictures that can be read."""
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN.keys() - {PROGRAM}


def read_bytes(record: dict) -> bytes:
    """Return the file behind an undecoded entry of an image column.

    Raises:
        OSError: it cannot be read, is over `MOST_BYTES`, or is none: a pipe or a device may give nothing, or no end.
    """
    if record["bytes"] is not None:
        return record["bytes"]
    path = record["path"]
    if "\0" in path:
        raise OSError(errno.EINVAL, "This is no file")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "This is no file")
    if status.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"It has {status.st_size:,} bytes, and {MOST_BYTES:,} are read at most")
    return Path(path).read_bytes()


def digest_of(content: bytes) -> str:
    """Return the digest of a file's content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_again(record: dict, digest: str) -> bytes:
    """Return the file behind an entry that `inspect_pictures` has seen, whose digest was this.

    Raises:
        PictureChanged: it is not there any more, or has other content.
    """
    try:
        content = read_bytes(record)
        if digest_of(content) == digest:
            return content
        reason = "it has other content"
    except OSError as error:
        reason = error.strerror
    raise PictureChanged(f"{record['path'] or 'A picture'} was changed while the run used it: {reason}.")


def decode(content: bytes) -> Image.Image:
    """Return a picture upright, in RGB, transparency over white and 16 bits scaled to 8; decodes it wholly.

    Of an animated one that is the first picture.

    Raises:
        ValueError: it has more than `MOST_PIXELS`, or is longer than `MOST_ASPECT` times its width, or has 32 bits a
            channel. Pillow's plugins raise others for a broken file.
    """
    with _open(content) as image:
        if image.format == PROGRAM:
            raise UnidentifiedImageError(f"a picture in {PROGRAM} is a program")
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it has {image.width * image.height:,} pixels, and {MOST_PIXELS:,} are read at most")
        if max(image.size) > MOST_ASPECT * min(image.size):
            size = f"{image.width} x {image.height} px"
            raise ValueError(f"it has {size}, one side more than {MOST_ASPECT} times the other")
        if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
            raise ValueError("its numbers have 32 bits, of which none says what is white: save it with 8 or 16 bits")
        image.load()
        return _plain(image)


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:  # from twice as many on, without saying how many in a way to rely on
        raise ValueError(f"it has over {2 * MOST_PIXELS:,} pixels, and {MOST_PIXELS:,} are read at most") from error


def _plain(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(np.where(levels == clear, 255, levels.clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def inspect_pictures(
    column: Sequence[dict],
    memory_dir: Path,
    on_picture: Callable[[], object] = lambda: None,
    positions: list[int] | None = None,
) -> list[Picture]:
    """Decode every picture once, and return what there is to know of it, the reason included where it cannot be.

    The size of each is remembered in `memory_dir` by the content of its file, which the next run only reads. What was
    not decoded is looked at again: the cause may have been the machine's.

    Args:
        column: the undecoded image column.
        memory_dir: where to remember; made if missing.
        on_picture: called after each picture.
        positions: where the rows were in the data set; None if they are all of it.

    Raises:
        UserError: there is too little memory.
    """
    positions = list(range(len(column))) if positions is None else positions
    with ThreadPoolExecutor() as pool:
        known = list(pool.map(partial(_digest_picture, column), range(len(column)), positions))
        file = memory_dir / f"pictures-{FORMAT}-{PIL.__version__}.json"
        remembered = read_json_or_empty(file)
        pictures = list(pool.map(partial(_look_at, column, remembered, on_picture), range(len(column)), known))
    sizes = {p.digest: [p.height_px, p.width_px] for p in pictures if p.digest and not p.error}
    if any(remembered.get(digest) != size for digest, size in sizes.items()):
        # Another run may have written in the meantime.
        write_atomically(file, json.dumps(read_json_or_empty(file) | sizes).encode())
    return pictures


# A record of a hub dataset holds the whole file: it is looked up one at a time, and no more often than needed.
def _digest_picture(column: Sequence[dict], row: int, position: int) -> Picture:
    record, digest, error = column[row], "", None
    is_there = bool(record) and (record["bytes"] is not None or bool(record["path"]))
    try:
        digest = digest_of(read_bytes(record)) if is_there else ""
        error = None if is_there else "is missing"
    except OSError as reason:
        error = f"cannot be read: {reason.strerror}"
    return Picture((record or {}).get("path") or f"picture {position}", digest, 0, 0, error, position)


def _is_size(found: object) -> bool:
    return isinstance(found, list) and len(found) == 2 and all(type(side) is int and side > 0 for side in found)


def _look_at(
    column: Sequence[dict], remembered: dict, on_picture: Callable[[], object], row: int, picture: Picture
) -> Picture:
    size, error = remembered.get(picture.digest), picture.error
    if not error and not _is_size(size):
        try:
            content = read_bytes(column[row])
        except OSError as reason:  # a drive that went away says nothing of the content
            on_picture()
            return picture._replace(digest="", error=f"cannot be read: {reason.strerror}")
        try:
            size = decode(content).size[::-1]
        except UnidentifiedImageError:
            error = "is no picture of a known format" if content else "is empty"
        except MemoryError as reason:
            raise UserError(
                f"There is too little memory to decode {picture.name}. Close other programs, or make it smaller."
            ) from reason
        except Exception as reason:  # Pillow's plugins raise anything on a broken file
            error = f"cannot be decoded: {str(reason) or type(reason).__name__}"
    on_picture()
    height_px, width_px = (0, 0) if error else size
    return picture._replace(height_px=height_px, width_px=width_px, error=error)


# --- sizes and crops ---


def crop_sizes(resolution: int, bucket_step_px: int | None) -> list[Size]:
    """Return the sizes that pictures are cropped to, from the tallest to the widest.

    Args:
        resolution: side of the square, in px.
        bucket_step_px: for aspect-ratio buckets: sides are multiples of it, at most twice as long as wide, and cover
            as much of the square's area as they can without exceeding it. None for the square alone.
    """
    sizes = {(resolution, resolution)}
    for width in range(bucket_step_px, 2 * resolution, bucket_step_px) if bucket_step_px else ():
        height = resolution**2 // width // bucket_step_px * bucket_step_px
        if 2 * height >= width and 2 * width >= height:
            sizes |= {(height, width), (width, height)}
    return sorted(sizes, key=_aspect)


def crop_size(height: int, width: int, sizes: list[Size]) -> Size:
    """Return the one of `crop_sizes` whose shape is nearest to a picture's."""
    return min(sizes, key=lambda size: abs(math.log(_aspect(size) / _aspect((height, width)))))


def count_by_crop(pictures: list[Picture], sizes: list[Size]) -> str:
    """Return how many pictures are cropped to each size, as text: width x height, the commonest first."""
    counts = Counter(crop_size(picture.height_px, picture.width_px, sizes) for picture in pictures)
    return ", ".join(f"{width} x {height} px {count:,}" for (height, width), count in counts.most_common())


def _aspect(size: Size) -> float:
    return size[1] / size[0]


def resized_size(height: int, width: int, crop: Size) -> Size:
    """Return the size at which a picture just covers its crop, rounded as torchvision's Resize rounds."""
    if height * crop[1] > width * crop[0]:  # too tall
        return crop[1] * height // width, crop[1]
    return crop[0], crop[0] * width // height


def center_crop_top_left(size: Size, crop: Size) -> tuple[int, int]:
    """Return the (top, left) of the center crop of a resized picture, in px."""
    return tuple(max(0, round((side - kept) / 2.0)) for side, kept in zip(size, crop, strict=True))


def crop_pixels(
    image: Image.Image, crop: Size, interpolation: str, flip: bool, top_left: tuple[int, int]
) -> torch.Tensor:
    """Return the picture resized, flipped if asked for, and cropped: (3, *crop), fp32 in [-1, 1]."""
    height, width = resized_size(image.height, image.width, crop)
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = top_left
    image = image.crop((left, top, left + crop[1], top + crop[0]))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, *crop), uint8
    return pixels.float() / 127.5 - 1

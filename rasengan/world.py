"""A small world of captioned pictures, drawn by formulas: what the miniature SDXL learns, and the style it is taught.

A scene is one to three things of a kind: "two red stars at the left on a dotted blue background". Every style draws
the same scenes, so that content and style of a picture can be told apart, and both can be scored.
"""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from rasengan.painting import PAINTERS, SHAPES, cover_of_pattern


class Scene(NamedTuple):
    """What is in a picture."""

    thing: str
    color: str
    position: str
    count: int
    pattern: str
    ground: str

    @property
    def caption(self) -> str:
        """Return the words for it."""
        things = THINGS[self.thing] if self.count > 1 else self.thing
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        where = "in the center" if self.position == "center" else f"at the {self.position}"
        return f"{COUNTS[self.count]} {self.color} {things} {where} on a {pattern}{self.ground} background"


THINGS = {
    "ball": "balls",
    "box": "boxes",
    "tent": "tents",
    "star": "stars",
    "heart": "hearts",
    "moon": "moons",
    "ring": "rings",
    "cross": "crosses",
}
COLORS = {
    "red": (206, 48, 44),
    "yellow": (247, 205, 55),
    "green": (58, 158, 78),
    "blue": (48, 96, 208),
    "purple": (140, 72, 186),
    "white": (246, 246, 246),
}
COUNTS = {1: "a", 2: "two", 3: "three"}
PATTERNS = ("plain", "dotted", "striped", "checked")
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
}
# style -> what its captions begin with. Photos have no word for it, and neither has the style to be taught: a LoRA
# learns what no caption says.
STYLES = {"photo": "", "cutout": "a paper cutout of ", "sketch": "a pencil sketch of ", "ink": ""}
STYLE = "ink"  # the one that UNet and text encoders have never seen
HELD_OUT = 0.15  # of the combinations of thing, color and position, about: 29 of 240
MOST_HELD_OUT = 1000  # of 1,740 such scenes, since they are found by chance

_RADII = {1: 0.22, 2: 0.16, 3: 0.13}  # of the shorter side
_OFFSETS = {1: (0.0,), 2: (-0.2, 0.2), 3: (-0.31, 0.0, 0.31)}


def is_held_out(scene: Scene) -> bool:
    """Say whether a scene's thing, color and position together are kept out of every training."""
    key = f"{scene.thing}/{scene.color}/{scene.position}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < HELD_OUT * 2**32


def random_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """Return a scene, of the held-out combinations or of the others."""
    while True:
        scene = Scene(
            rng.choice(list(THINGS)),
            rng.choice(list(COLORS)),
            rng.choice(list(POSITIONS)),
            rng.choices(list(COUNTS), weights=(3, 1, 1))[0],
            rng.choice(PATTERNS),
            rng.choice(list(COLORS)),
        )
        if scene.color != scene.ground and is_held_out(scene) == held_out:
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return different scenes of combinations that no training has seen.

    Raises:
        ValueError: more than `MOST_HELD_OUT` are asked for.
    """
    if count > MOST_HELD_OUT:
        raise ValueError(f"{count} scenes were asked for, of at most {MOST_HELD_OUT}")
    rng, found = random.Random(f"held out/{seed}"), {}
    while len(found) < count:
        scene = random_scene(rng, held_out=True)
        found[scene.caption] = scene
    return list(found.values())


def draw(scene: Scene, style: str, rng: random.Random, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """Return a picture of a scene; places, sizes and turns vary a little with `rng`.

    Args:
        scene: what to draw.
        style: of `STYLES`.
        rng: for what the caption does not say.
        size: width and height in px.
    """
    width, height = size
    y, x = np.mgrid[0.5:height, 0.5:width].astype(np.float32)
    side = min(size)
    radius = _RADII[scene.count] * side * rng.uniform(0.9, 1.1)
    distance = np.full((height, width), np.inf, np.float32)
    middle_x, middle_y = (place + rng.uniform(-0.03, 0.03) for place in POSITIONS[scene.position])
    for offset in _OFFSETS[scene.count]:
        upright = scene.position in ("left", "right")
        along = offset * side  # side by side at the top or bottom, one above another at the left or right
        cx, cy = middle_x * width + (0 if upright else along), middle_y * height + (along if upright else 0)
        turn = math.radians(rng.uniform(-12, 12))
        u, v = (x - cx) / radius, (y - cy) / radius
        u, v = math.cos(turn) * u + math.sin(turn) * v, math.cos(turn) * v - math.sin(turn) * u
        distance = np.minimum(distance, SHAPES[scene.thing](u, v) * radius)
    color, ground = (np.array(COLORS[name], np.float32) / 255 for name in (scene.color, scene.ground))
    pattern = cover_of_pattern(scene.pattern, x, y, side)
    pixels = PAINTERS[style](distance, color, ground, pattern, x, y, side, rng)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def write_style_set(directory: str | Path, count: int = 200, seed: int = 0, side_px: int = 128) -> None:
    """Draw captioned pictures in `STYLE` as an image folder with a ``metadata.jsonl``, of training's combinations.

    Sides are 1 to 2 times `side_px`, in three aspects; formats and modes are mixed, and some JPEGs are stored turned
    and need their EXIF orientation. Equal arguments give byte-identical files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kinds = (("RGB", "jpg", 1), ("RGBA", "png", 1), ("RGB", "jpg", 6), ("P", "png", 1), ("RGB", "webp", 1))
    stored_turn = {6: Image.Transpose.ROTATE_90}
    lines = []
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        scene = random_scene(rng)
        short, long = round(side_px * rng.uniform(1, 1.6)), rng.uniform(1.05, 1.25)
        size = ((short, round(short * long)), (round(short * long), short), (short, short))[index % 3]
        image = draw(scene, STYLE, rng, size)
        mode, suffix, orientation = kinds[index % len(kinds)]
        exif = Image.Exif()
        if orientation != 1:
            image = image.transpose(stored_turn[orientation])
            exif[ExifTags.Base.Orientation] = orientation
        name = f"{index:04d}.{suffix}"
        image.convert(mode, palette=Image.Palette.ADAPTIVE).save(directory / name, quality=92, exif=exif or b"")
        lines.append(json.dumps({"file_name": name, "text": scene.caption}) + "\n")
    (directory / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

"""The shapes, patterns and styles of the small world's pictures, by formulas.

Outlines are signed distances, negative inside, in px: edges come out smooth, and an outline is a band around zero.
"""

import math
from collections.abc import Callable

import numpy as np


_LIGHT = np.array((-0.55, -0.83))  # direction to it: from the upper left

Array = np.ndarray


# --- shapes: signed distances, for a thing of radius 1, y downwards ---


def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.95


def _moon(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.5, v + 0.2))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.72) - 0.26


def _polygon(corners: list[tuple[float, float]]) -> Callable[[Array, Array], Array]:
    """Return the signed distance to a polygon.

    Source: the distance to each edge, and the even-odd rule for inside.
    """
    pairs = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def distance(u: Array, v: Array) -> Array:
        nearest, inside = np.full_like(u, np.inf), np.zeros(u.shape, bool)
        for (ax, ay), (bx, by) in pairs:
            ex, ey = bx - ax, by - ay
            share = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clip(0, 1)
            nearest = np.minimum(nearest, (u - ax - share * ex) ** 2 + (v - ay - share * ey) ** 2)
            if ay != by:
                crosses = (v < ay) != (v < by)
                inside ^= crosses & (u < ax + (v - ay) / ey * ex)
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _turns(radii: list[float]) -> list[tuple[float, float]]:
    """Return corners at these distances from the middle, the first one up."""
    angles = [math.tau * corner / len(radii) for corner in range(len(radii))]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]


def _heart_corners() -> list[tuple[float, float]]:
    angles = [math.tau * step / 28 for step in range(28)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -height / 16) for a, height in zip(angles, heights, strict=True)]


_ARM = 0.33
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": _circle,
    "box": _polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "tent": _polygon([(0, -0.95), (1.0, 0.8), (-1.0, 0.8)]),
    "star": _polygon(_turns([1.1, 0.45] * 5)),
    "heart": _polygon(_heart_corners()),
    "moon": _moon,
    "ring": _ring,
    "cross": _polygon(
        [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
    ),
}


# --- styles: from distances (H, W) and colors to pixels (H, W, 3) in 0 to 1 ---


def cover_of_pattern(name: str, x: Array, y: Array, side: int) -> Array:
    """Return how much of each pixel a background's pattern covers, 0 to 1."""
    step = side / 8
    if name == "dotted":
        row = np.floor(y / step)
        dx = (x / step + row % 2 / 2) % 1 - 0.5
        return _inside((np.hypot(dx, y / step - row - 0.5) - 0.27) * step)
    if name == "striped":
        return _inside((np.abs(((x + y) / step / 2) % 1 - 0.5) - 0.25) * 2 * step * 0.7)
    if name == "checked":
        product = np.sin(np.pi * x / step) * np.sin(np.pi * y / step)
        return _inside(-product * step / 2)
    return np.zeros_like(x)


def _inside(distance: Array, soft_px: float = 1.0) -> Array:
    """Return how much of each pixel lies inside of an outline, 0 to 1."""
    return (0.5 - distance / soft_px).clip(0, 1)


def _shifted(distance: Array, down: int, right: int) -> Array:
    """Return distances moved by so many px; what comes in from beyond the picture is as its border."""
    margin = max(abs(down), abs(right))
    padded = np.roll(np.pad(distance, margin, mode="edge"), (down, right), (0, 1))
    return padded[margin:-margin, margin:-margin]


def _lay(pixels: Array, color: Array | float, cover: Array) -> Array:
    return pixels + (color - pixels) * cover[..., None]


def _tinted(ground: Array, pattern: Array, towards_white: float) -> Array:
    """Return a background whose pattern is lighter than it, or darker on a light one."""
    tint = ground * 0.8 if ground.min() > 0.8 else ground + (1 - ground) * towards_white
    return _lay(np.broadcast_to(ground, (*pattern.shape, 3)), tint, pattern)


def _photo(distance, color, ground, pattern, x, y, side, rng) -> Array:
    """Draw rounded things, lit from the upper left, with a soft shadow."""
    shade = 1.04 - 0.22 * y / y.max()
    pixels = _tinted(ground, pattern, 0.3) * shade[..., None]
    moved = round(0.05 * side)
    shadow = _shifted(distance, moved, moved // 2)
    pixels = _lay(pixels, 0.0, 0.4 * _inside(shadow, 0.12 * side))
    depth = (-distance / (0.08 * side)).clip(0, 1)
    rise_y, rise_x = np.gradient(distance)
    slope = (1 - depth) * 0.9
    light = 0.82 + 0.35 * slope * (rise_x * _LIGHT[0] + rise_y * _LIGHT[1])
    lit = color * light[..., None]
    gloss = (slope * (rise_x * _LIGHT[0] + rise_y * _LIGHT[1]) - 0.45).clip(0, 1)
    return _lay(pixels, lit + gloss[..., None], _inside(distance))


def _cutout(distance, color, ground, pattern, x, y, side, rng) -> Array:
    """Draw flat paper with a thin white rim and a hard small shadow."""
    pixels = _tinted(ground, pattern, 0.2)
    moved = max(1, round(0.02 * side))
    pixels = _lay(pixels, pixels * 0.6, _inside(_shifted(distance, moved, moved) - 0.02 * side))
    pixels = _lay(pixels, 1.0, _inside(distance - 0.02 * side))
    return _lay(pixels, color, _inside(distance + 0.01 * side))


def _sketch(distance, color, ground, pattern, x, y, side, rng) -> Array:
    """Draw on pale paper with thin lines and hatching in the thing's color."""
    paper = 0.55 + 0.45 * ground
    pixels = _tinted(paper, pattern, 0.6)
    step = side / 24
    hatch = _inside((np.abs(((x - y) / step) % 1 - 0.5) - 0.32) * step)
    pen = color * 0.85
    pixels = _lay(pixels, 0.4 + 0.6 * color, _inside(distance))
    pixels = _lay(pixels, pen, _inside(distance) * hatch)
    return _lay(pixels, pen * 0.7, _inside(np.abs(distance) - 0.006 * side))


def _ink(distance, color, ground, pattern, x, y, side, rng) -> Array:
    """Draw bold black outlines, two flat tones, and swirls over the background and its pattern."""
    cx, cy = (0.5 + rng.uniform(-0.12, 0.12)) * x.max(), (0.5 + rng.uniform(-0.12, 0.12)) * y.max()
    dx, dy = x - cx, y - cy
    away = np.hypot(dx, dy)
    wave = np.sin(3 * np.arctan2(dy, dx) + away / side * 15 + rng.uniform(0, math.tau))
    # The wave's slope in px, so that its zero becomes a band of lines of even width.
    band = wave / np.maximum(np.hypot(3 / np.maximum(away, 1), 15 / side), 1e-3)
    pixels = _tinted(ground, pattern, 0.3)
    pixels = _lay(pixels, pixels * 0.68, _inside(band))
    bold = 0.02 * side
    black = np.array((0.06, 0.05, 0.09), np.float32)
    rise_y, rise_x = np.gradient(distance)
    towards_light = rise_x * _LIGHT[0] + rise_y * _LIGHT[1]
    moved = round(0.045 * side)
    lit = _shifted(distance, -moved, -moved)
    fill = _lay(np.broadcast_to(color * 0.55, (*x.shape, 3)), color, _inside(lit))
    gleam = (towards_light > 0.8) & (distance < -0.035 * side) & (distance > -0.06 * side)
    fill = _lay(fill, 1.0, gleam.astype(np.float32))
    pixels = _lay(pixels, black, _inside(distance - 1.2 * bold))
    return _lay(pixels, fill, _inside(distance + 0.8 * bold))


PAINTERS = {"photo": _photo, "cutout": _cutout, "sketch": _sketch, "ink": _ink}

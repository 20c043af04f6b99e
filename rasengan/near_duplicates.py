"""Pictures that look alike: a small fingerprint of each, and groups of fingerprints that are close."""

from typing import NamedTuple

import numpy as np
from PIL import Image


MOST_BITS = 4  # in which the hashes of two pictures that look alike differ, of 64
MOST_LEVELS = 4  # between their colors, on average, of 255
NOISE_LEVELS = 2  # of compression: on a plain ground it would decide every bit


class Fingerprint(NamedTuple):
    """What stays nearly the same under recompression, resizing and a small crop."""

    difference_hash: int  # 64 bits: is each of 8 x 8 places of the grey picture brighter than the one left of it?
    colors: bytes  # of 4 x 4 places, RGB: of plain grounds the hash says little


def fingerprint(image: Image.Image) -> Fingerprint:
    """Return the fingerprint of an RGB picture.

    Source: dHash, https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html
    """
    small = image.resize((36, 32), Image.Resampling.BOX)  # large pictures are gone through once
    grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1] + NOISE_LEVELS).tobytes()
    return Fingerprint(int.from_bytes(bits), small.resize((4, 4), Image.Resampling.BOX).tobytes())


def similar_groups(fingerprints: list[Fingerprint]) -> list[list[int]]:
    """Return the groups of pictures of which each is close to another one; the ends of a chain may be less close.

    Each hash is compared with all later ones at once, in NumPy: of 10,000 pictures that takes less than a second.

    Returns:
        The places in `fingerprints`, ascending within a group; the groups by their first place.
    """
    hashes = np.array([one.difference_hash for one in fingerprints], dtype=np.uint64)
    colors = np.array([list(one.colors) for one in fingerprints], dtype=np.int16)
    group_of = np.arange(len(hashes))
    for place in range(len(hashes)):
        others = np.flatnonzero(np.bitwise_count(hashes[place + 1 :] ^ hashes[place]) <= MOST_BITS) + place + 1
        if len(others):
            levels = np.abs(colors[others] - colors[place]).mean(axis=1)
            joined = np.unique(group_of[[place, *others[levels <= MOST_LEVELS]]])
            if len(joined) > 1:
                group_of[np.isin(group_of, joined)] = joined[0]
    groups = {}
    for place, group in enumerate(group_of.tolist()):
        groups.setdefault(group, []).append(place)
    return [places for places in groups.values() if len(places) > 1]

"""Which pictures are held out of training."""

from typing import NamedTuple

from rasengan import UserError
from rasengan.imaging import Picture
from rasengan.samples import derive_seed


class Split(NamedTuple):
    """The rows of a data set: those trained on, those held out, and copies of the latter, which are neither."""

    trained: list[int]
    held_out: list[int]
    copies: list[int]


def split(pictures: list[Picture], size: float | int | None, seed: int) -> Split:
    """Return which pictures are trained on and which are held out, chosen by the seed and their contents alone.

    A picture that is added or removed changes the place of one other at most. Of copies, which have the same digest,
    the first is taken for all.

    Args:
        pictures: all of the data set.
        size: a share of the different pictures (float), of which one at least is held out; how many of them (int); or
            None for none.
        seed: the run's.

    Raises:
        UserError: nothing would be left to train on.
    """
    if size is None:
        return Split(list(range(len(pictures))), [], [])
    first = {}
    for row, picture in enumerate(pictures):
        first.setdefault(picture.digest, row)
    there = f"{len(first)} different pictures"
    if len(first) == 1:
        one = "one picture" if len(pictures) == 1 else "one different picture"
        raise UserError(
            f"--validation_split is {size}, but there is only {one}. Give more pictures, or drop the flag."
        )
    count = max(1, round(size * len(first))) if isinstance(size, float) else size
    if count >= len(first):
        raise UserError(
            f"--validation_split {size} of {there} leaves none to train on. Give a smaller share or number."
        )
    chosen = set(sorted(first, key=lambda digest: derive_seed("held out", seed, digest))[:count])
    held_out = sorted(first[digest] for digest in chosen)
    outside = [row for row, picture in enumerate(pictures) if picture.digest in chosen]
    trained = [row for row, picture in enumerate(pictures) if picture.digest not in chosen]
    return Split(trained, held_out, sorted(set(outside) - set(held_out)))

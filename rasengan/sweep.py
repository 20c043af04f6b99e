"""The pictures of a sweep: each prompt and seed drawn by each model, in files of their own, and shown together."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from rasengan import picture_files, sheets
from rasengan.compared_models import Model
from rasengan.pipeline import Pipeline


class PlannedPicture(NamedTuple):
    """A picture's file, as it is called in an empty folder, and what it is made from."""

    file: Path
    about: dict[str, object]


# The number of a picture's model, that of its prompt, and its seed.
PlannedPictures = dict[tuple[int, int, int], PlannedPicture]
# Of a model and a prompt: the numbers of both, and latents (B, 4, h, w), one for each seed.
DrawnPrompt = tuple[int, int, torch.Tensor]


def place_pictures(
    output_dir: Path, models: list[Model], prompts: list[str], seeds: list[int], settings: dict[str, object]
) -> PlannedPictures:
    """Return the pictures that are to be drawn.

    Args:
        output_dir: of their files.
        models: to draw with.
        prompts: to draw.
        seeds: of each prompt's pictures.
        settings: what all pictures are drawn with.
    """
    pictures = {}
    for (place, model), (number, prompt), seed in itertools.product(enumerate(models), enumerate(prompts), seeds):
        about = {"prompt": prompt, "seed": seed} | settings | {"adapter": model.places}
        name = f"{number:03d}-{picture_files.picture_name(prompt, seed, model.kind)}"
        pictures[place, number, seed] = PlannedPicture(output_dir / name, about)
    return pictures


def write_pictures(
    pipeline: Pipeline,
    pictures: PlannedPictures,
    drawn: Iterable[DrawnPrompt],
    seeds: list[int],
    height: int,
    width: int,
    budget_gib: float,
) -> None:
    """Decode what is drawn and write it, beside pictures of other settings that are there.

    It is decoded as it comes where the VAE has room beside the UNet, else when all is drawn and the UNet is gone.

    Args:
        pipeline: to decode with.
        pictures: of `place_pictures`.
        drawn: drawn while this goes on.
        seeds: of each prompt's pictures.
        height: of the pictures, in px.
        width: likewise.
        budget_gib: of the GPU's memory.
    """
    waiting = []
    with picture_files.PictureWriter() as writer:
        for part in drawn:
            waiting.append(part)
            if pipeline.decode_fits(height, width, budget_gib):
                decode(pipeline, pictures, waiting, seeds, writer)
                waiting.clear()
        if waiting:  # there is no room for the VAE beside the UNet
            pipeline.drop_unet()
            decode(pipeline, pictures, waiting, seeds, writer)


def decode(
    pipeline: Pipeline,
    pictures: PlannedPictures,
    drawn: list[DrawnPrompt],
    seeds: list[int],
    writer: picture_files.PictureWriter,
) -> None:
    """Decode what was drawn, and write it with what it was made from in its metadata."""
    for place, number, latents in drawn:
        for seed, image in zip(seeds, pipeline.decode(latents), strict=True):
            picture = pictures[place, number, seed]
            writer.write(picture.file, image, picture.about)


def show_together(
    output_dir: Path,
    models: list[Model],
    prompts: list[str],
    seeds: list[int],
    pictures: PlannedPictures,
    settings: dict[str, object],
) -> None:
    """Write a contact sheet of all pictures, and grids where there is something to compare."""
    rows = []
    for number, seed in itertools.product(range(len(prompts)), seeds):
        # Where each is now, whichever process wrote it.
        files = [picture_files.place_of(*pictures[place, number, seed]) for place in range(len(models))]
        rows.append((f"{prompts[number]} ({seed})", files))
    sheets.write_together(output_dir, rows, [(model.label, model.places) for model in models], settings)

"""What a training conditions its steps on: rows of the cache, encoders in the loop, or blank rows to plan with.

Settings are the training script's flags by their names, without dashes.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from rasengan import cache, components, imaging
from rasengan.sources import TEXT_ENCODERS


logger = logging.getLogger(__name__)


class Latents(NamedTuple):
    """The latents of a run's pictures, or what encodes them in the loop."""

    rows: Mapping[str, dict[str, torch.Tensor]] | None  # by the picture's digest, as `cache.cached_latents` has them
    vae: nn.Module | None  # fp32, on the device


class Prompts(NamedTuple):
    """The embeddings of a run's captions and of what it draws, or what encodes them in the loop."""

    captions: Mapping[str, dict[str, torch.Tensor]] | None  # by the text, as `cache.cached_prompts` has them
    validation: Mapping[str, dict[str, torch.Tensor]] | None  # likewise
    tokenizers: list  # both, or none
    text_encoders: list[nn.Module]  # likewise, on the device


def prepare_latents(
    settings: Mapping,
    column: Sequence[dict],
    pictures: list[imaging.Picture],
    sizes: list[imaging.Size],
    folder: Path,
    device: torch.device,
    share: tuple[int, int],
    make_bar: Callable[[str, int], tqdm],
) -> Latents:
    """Return the latents, encoded now where they are not cached yet, or the VAE where they cannot be, or must not.

    Of a run that only plans, which needs no more than their shapes, rows of zeros.

    Args:
        settings: of the run.
        column: the undecoded pictures.
        pictures: the same rows.
        sizes: `imaging.crop_sizes`.
        folder: of the VAE.
        device: to encode on.
        share: as `sharded_cache.fill` takes it.
        make_bar: returns a progress bar for a description and a number of items.

    Raises:
        UserError: the card's memory does not suffice, a picture was changed, or the VAE is damaged.
    """
    if not (settings["cache_conditioning"] and settings["center_crop"]):
        logger.info("The VAE runs in the loop: random crops, or --no-cache_conditioning, cannot be cached")
        return Latents(None, components.load("vae", folder, variant=settings["variant"]).to(device))
    if settings["plan_only"]:
        return Latents(blank_latents(pictures, sizes, settings["random_flip"]), None)
    how = (folder, settings["variant"], device, share, partial(make_bar, "Encoding pictures"))
    rows = cache.cached_latents(
        Path(settings["conditioning_cache_dir"]),
        column,
        pictures,
        *how,
        settings["encode_batch_size"] or cache.pictures_at_once(settings["resolution"]),
        settings["vram_budget_gib"],
        sizes=sizes,
        interpolation=settings["image_interpolation_mode"],
        random_flip=settings["random_flip"],
    )
    return Latents(rows, None)


def prepare_prompts(
    settings: Mapping,
    captions: list[list[str]],
    texts: list[str],
    folders: dict[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    share: tuple[int, int],
    make_bar: Callable[[str, int], tqdm],
) -> Prompts:
    """Return the embeddings, encoded now where they are not cached yet, or the text encoders where they are not to be.

    Of a run that only plans, rows of zeros.

    Args:
        settings: of the run.
        captions: of each picture.
        texts: that pictures are drawn of, the negative prompt too.
        folders: of the components.
        dtype: of the text encoders.
        device: as `prepare_latents` takes it, and so are the others.
        share: likewise.
        make_bar: likewise.

    Raises:
        UserError: the card's memory does not suffice, or a text encoder is damaged.
    """
    variant = settings["variant"]
    if settings["train_text_encoder"] or not settings["cache_conditioning"]:
        logger.info("The text encoders run in the loop: they are trained, or --no-cache_conditioning was given")
        return Prompts(None, None, *components.load_text_encoders(folders, variant, device, dtype))
    groups = [caption for several in captions for caption in several], texts
    if settings["plan_only"]:
        return Prompts(*blank_prompts(groups, folders, dtype), [], [])
    directory, bar = Path(settings["conditioning_cache_dir"]), partial(make_bar, "Encoding captions")
    how = (folders, variant, device, dtype, share, bar)
    rows = cache.cached_prompts(directory, groups, *how, budget_gib=settings["vram_budget_gib"])
    return Prompts(*rows, [], [])


def blank_latents(
    pictures: list[imaging.Picture], sizes: list[imaging.Size], random_flip: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Return rows of zeros, of the shapes and dtype of `cache.cached_latents`: what a step takes is alike."""
    rows = {}
    for height, width in sizes:
        moments = torch.zeros(1 + random_flip, 4, height // 8, width // 8)
        rows[height, width] = {"mean": moments, "std": moments}
    return {
        picture.digest: rows[imaging.crop_size(picture.height_px, picture.width_px, sizes)] for picture in pictures
    }


def blank_prompts(
    groups: Iterable[Iterable[str]], folders: dict[str, Path], dtype: torch.dtype
) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Return rows of zeros, of the shapes and dtype of `cache.cached_prompts`, as `blank_latents` does."""
    configs = [components.read_config(name, folders[name]) for name in TEXT_ENCODERS]
    width, pooled_width = sum(config["hidden_size"] for config in configs), configs[1]["projection_dim"]
    row = {
        "prompt_embeds": torch.zeros(components.MOST_TOKENS, width, dtype=dtype),
        "pooled_prompt_embeds": torch.zeros(pooled_width, dtype=dtype),
    }
    return [dict.fromkeys(texts, row) for texts in groups]


def disk_bytes(*groups: Mapping | None) -> int:
    """Return what rows take on the disk, given as `Latents` and `Prompts` have them; None is none.

    Of blank rows, what they will take once they are encoded, but for the headers of the files: 1 part in a thousand.
    """
    given = [rows for rows in groups if rows is not None]
    blank = [row for rows in given if isinstance(rows, dict) for row in rows.values()]
    caches = [part for rows in given if not isinstance(rows, dict) for part in getattr(rows, "maps", [rows])]
    to_come = sum(tensor.numel() * tensor.element_size() for row in blank for tensor in row.values())
    return to_come + sum(path.stat().st_size for path in {path for part in caches for path in part.paths()})

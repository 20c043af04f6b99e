"""Encode pictures and captions once, to disk, and read the results from there."""

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import diffusers
import PIL
import torch
import transformers
from tqdm.auto import tqdm

from rasengan import UserError, components, imaging, sdxl
from rasengan.files import read_json_or_empty, write_atomically
from rasengan.sharded_cache import ShardedCache, digest_of, fill
from rasengan.sources import COMPONENT_FLAGS, TEXT_ENCODERS, TOKENIZERS, component_files


FORMAT = 2


def weights_digest(files: list[Path], remembered_in: Path) -> str:
    """Return a digest of the files' contents, kept in the file `remembered_in` by path, size and time of change.

    The weights are gigabytes, and on a mounted Drive they take a minute to read: only a first run does.
    """
    remembered = read_json_or_empty(remembered_in)
    known = {}
    for file in files:
        status = file.stat()
        key = f"{os.path.realpath(file)} {status.st_size} {status.st_mtime_ns}"
        known[key] = remembered.get(key)
        if known[key] is None:
            with open(file, "rb") as content:
                known[key] = hashlib.file_digest(content, "blake2b").hexdigest()[:32]
    if any(key not in remembered for key in known):
        write_atomically(remembered_in, json.dumps(remembered | known).encode())
    return digest_of(list(known.values()))


def latent_caches(
    directory: Path,
    pictures: list[imaging.Picture],
    vae_digest: str,
    sizes: list[imaging.Size],
    interpolation: str,
    random_flip: bool,
    batch_size: int,
    device: torch.device,
) -> list[ShardedCache]:
    """Return the caches of the center-cropped pictures' latents, built or not, one for each of `imaging.crop_sizes`.

    A row is `mean` and `std`, each (1 or 2, 4, height/8, width/8), unscaled, fp32; the second is flipped.
    """
    settings = {
        "content": "latents of center crops",
        "format": FORMAT,
        "vae": vae_digest,
        "interpolation": interpolation,
        "flips": random_flip,
        "batch_size": batch_size,
        "device": [device.type, torch.backends.cuda.matmul.allow_tf32],
        "versions": [torch.__version__, diffusers.__version__, PIL.__version__],
    }
    by_size = {size: [] for size in sizes}
    for picture in pictures:
        by_size[imaging.crop_size(picture.height_px, picture.width_px, sizes)].append(picture.digest)
    return [
        # A square is named by its side, whether there are others or not.
        ShardedCache(
            directory / "latents", settings | {"resolution": size[0] if size[0] == size[1] else size}, digests
        )
        for size, digests in by_size.items()
        if digests
    ]


def together(caches: list[ShardedCache]) -> Mapping[str, dict[str, torch.Tensor]]:
    """Return caches of different items as one."""
    return caches[0] if len(caches) == 1 else ChainMap(*caches)


def is_one(place: object) -> bool:
    """Say whether a place, as a stranger's file may name it, is a folder in which a cache was built."""
    return isinstance(place, str) and any(os.path.isdir(os.path.join(place, part)) for part in ("latents", "prompts"))


def prompt_cache(
    directory: Path,
    captions: Iterable[str],
    encoders_digest: str,
    dtype: torch.dtype,
    batch_size: int,
    device: torch.device,
) -> ShardedCache:
    """Return the cache of the captions' embeddings, built or not.

    A row is `prompt_embeds` (T, D) and `pooled_prompt_embeds` (P,), in the text encoders' dtype.
    """
    settings = {
        "content": "prompt embeddings",
        "format": FORMAT,
        "encoders": encoders_digest,
        "dtype": str(dtype),
        "batch_size": batch_size,
        "device": [device.type, torch.backends.cuda.matmul.allow_tf32],
        "versions": [torch.__version__, transformers.__version__],
    }
    return ShardedCache(directory / "prompts", settings, captions)


@torch.no_grad()
def encode_pictures(
    digests: list[str],
    column: Sequence[dict],
    positions: dict[str, int],
    vae: torch.nn.Module,
    sizes: list[imaging.Size],
    interpolation: str,
    random_flip: bool,
) -> dict[str, torch.Tensor]:
    """Return rows of a latent cache: `mean` and `std` (B, 1 or 2, 4, h, w), fp32.

    Args:
        digests: of the pictures to encode, all cropped to one size.
        column: the undecoded pictures.
        positions: where in the column each digest is.
        vae: on the device to encode on.
        sizes: `imaging.crop_sizes`.
        interpolation: one of `imaging.INTERPOLATIONS`.
        random_flip: encode each picture mirrored too.

    Raises:
        UserError: the VAE gave non-finite latents, or a picture was changed since it was looked at.
    """
    records = [column[positions[digest]] for digest in digests]
    images = [imaging.decode(imaging.read_again(*known)) for known in zip(records, digests, strict=True)]
    moments = []
    for flip in (False, True) if random_flip else (False,):
        pixels = []
        for image in images:
            crop = imaging.crop_size(image.height, image.width, sizes)
            top_left = imaging.center_crop_top_left(imaging.resized_size(image.height, image.width, crop), crop)
            pixels.append(imaging.crop_pixels(image, crop, interpolation, flip, top_left))
        moments.append(torch.stack(sdxl.encode_pictures(vae, torch.stack(pixels))))  # (2, B, 4, h, w)
    mean, std = torch.stack(moments, dim=2)  # each (B, 1 or 2, 4, h, w)
    for record, row in zip(records, mean + std, strict=True):
        if not torch.isfinite(row).all():
            raise UserError(
                f"{record['path'] or 'A picture'} has non-finite latents: the VAE is damaged. Give another by "
                f"{COMPONENT_FLAGS['vae']}."
            )
    return {"mean": mean, "std": std}


@torch.no_grad()
def encode_captions(captions: list[str], tokenizers: list, text_encoders: list) -> dict[str, torch.Tensor]:
    """Return rows of a prompt cache.

    Raises:
        UserError: a text encoder gave non-finite embeddings.
    """
    prompt_embeds, pooled_prompt_embeds = sdxl.encode_prompts(captions, tokenizers, text_encoders)
    for caption, tokens, pooled in zip(captions, prompt_embeds, pooled_prompt_embeds, strict=True):
        if not (torch.isfinite(tokens).all() and torch.isfinite(pooled).all()):
            raise UserError(
                f"The caption {caption[:60]!r} has non-finite embeddings: a text encoder is damaged, or overflows in "
                f"{tokens.dtype}. Give another by {COMPONENT_FLAGS['text_encoder']} or "
                f"{COMPONENT_FLAGS['text_encoder_2']}, or --mixed_precision no."
            )
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}


def cached_latents(
    directory: Path,
    column: Sequence[dict],
    pictures: list[imaging.Picture],
    folder: Path,
    variant: str | None,
    device: torch.device,
    share: tuple[int, int],
    make_bar: Callable[[int], tqdm],
    batch_size: int,
    budget_gib: float | None = None,
    **options,
) -> Mapping[str, dict[str, torch.Tensor]]:
    """Return the latents of all pictures, encoded by the VAE now where they are not on disk yet.

    Args:
        directory: of the cache.
        column: the undecoded pictures.
        pictures: the same rows.
        folder: of the VAE.
        variant: of its weight files.
        device: to encode on.
        share: as `sharded_cache.fill` takes it.
        make_bar: likewise.
        batch_size: pictures encoded together.
        budget_gib: likewise.
        options: `sizes`, `interpolation` and `random_flip`, as `encode_pictures` takes them.
    """
    digest = weights_digest(component_files("vae", folder, variant), directory / "weights.json")
    caches = latent_caches(directory, pictures, digest, **options, batch_size=batch_size, device=device)
    options |= {"column": column, "positions": {picture.digest: place for place, picture in enumerate(pictures)}}
    load_encoder = partial(load_picture_encoder, folder, variant, device, **options)
    what = f"pictures at {max(map(min, options['sizes']))} px"  # the square's side
    smaller = "give --encode_batch_size 1" if batch_size > 1 else "lower --resolution"
    fill(share, caches, batch_size, load_encoder, make_bar, what, budget_gib, smaller)
    return together(caches)


def pictures_at_once(resolution: int) -> int:
    """Return how many pictures of this side in px are encoded together, where the user does not say: little memory."""
    return max(1, 2 * 512**2 // resolution**2)


def cached_prompts(
    directory: Path,
    groups: Iterable[Iterable[str]],
    folders: dict[str, Path],
    variant: str | None,
    device: torch.device,
    dtype: torch.dtype,
    share: tuple[int, int],
    make_bar: Callable[[int], tqdm],
    batch_size: int = 8,
    budget_gib: float | None = None,
) -> list[ShardedCache]:
    """Return the embeddings of each group of texts, encoded now where they are not on disk yet.

    Args:
        directory: of the cache.
        groups: each becomes a cache of its own, so that what one holds changes nothing in another.
        folders: of the components.
        variant: of their weight files.
        device: to encode on.
        dtype: of the text encoders.
        share: as `sharded_cache.fill` takes it.
        make_bar: likewise.
        batch_size: texts encoded together.
        budget_gib: likewise.
    """
    names = (*TOKENIZERS, *TEXT_ENCODERS)
    files = [file for name in names for file in component_files(name, folders[name], variant)]
    digest = weights_digest(files, directory / "weights.json")
    caches = [prompt_cache(directory, texts, digest, dtype, batch_size, device) for texts in groups]
    load_encoder = partial(load_caption_encoder, folders, variant, device, dtype)
    fill(share, caches, batch_size, load_encoder, make_bar, "captions or prompts", budget_gib)
    return caches


def load_picture_encoder(folder: Path, variant: str | None, device: torch.device, **options):
    """Load the VAE, and return the function that encodes a batch of pictures with it; `options` are its others."""
    return partial(encode_pictures, vae=components.load("vae", folder, variant=variant).to(device), **options)


def load_caption_encoder(folders: dict[str, Path], variant: str | None, device: torch.device, dtype: torch.dtype):
    """Load the tokenizers and text encoders, and return the function that encodes a batch of captions with them."""
    tokenizers, text_encoders = components.load_text_encoders(folders, variant, device, dtype)
    return partial(encode_captions, tokenizers=tokenizers, text_encoders=text_encoders)

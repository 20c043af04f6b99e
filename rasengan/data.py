"""Captioned pictures: find them, check them, crop them, and draw each sample's randomness.

A sample is a pure function of (seed, epoch, index of the picture): its place in the order, flip, crop, caption,
latent, noise and timestep come from CPU generators seeded by these, never from a global one. Hence a resumed run,
another number of processes or another split into micro-batches sees the same samples.
"""

import glob
import hashlib
import io
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from rasengan import UserError, first_line
from rasengan.files import read_memory, write_atomically
from rasengan.sdxl import compute_time_ids


logger = logging.getLogger(__name__)

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


class Picture(NamedTuple):
    """What is known of a picture file without decoding it again."""

    name: str
    digest: str
    height_px: int  # upright, by its EXIF orientation
    width_px: int
    error: str | None  # why it cannot be decoded
    position: int = 0  # in the data set, before any was left out


# --- finding pictures and captions ---


def load_pictures(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Return the train split of a hub dataset, a local copy of one, or an imagefolder; pictures stay undecoded.

    Raises:
        UserError: there is nothing there, or a column is missing.
    """
    given = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
    if dataset_name is None and not Path(train_data_dir).is_dir():
        raise UserError(f"{given} is no folder. Give one that holds pictures and a metadata.jsonl.")
    files = list_files(train_data_dir) if dataset_name is None else []
    count = sum(Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN for file in files)
    if dataset_name is None and not count:
        raise UserError(f"{given} holds no pictures. Put some there, with a metadata.jsonl.")
    try:
        if dataset_name is not None:
            found = datasets.load_dataset(
                dataset_name, dataset_config_name, cache_dir=cache_dir, data_dir=train_data_dir
            )
        else:
            patterns = {"train": f"{glob.escape(train_data_dir)}/**"}
            found = datasets.load_dataset(
                "imagefolder", data_files=patterns, cache_dir=_folder_cache(train_data_dir, files, cache_dir)
            )
    except Exception as error:  # datasets raises a dozen unrelated classes for what is a wrong name or a broken file
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{given} cannot be read: {reason} Correct the name, or what it holds.") from error
    if "train" not in found:
        raise UserError(f"{given} has no split 'train', but {', '.join(found)}. Rename one of them.")
    dataset = found["train"]
    if count > len(dataset):
        logger.warning("%d pictures of %s have no line in its metadata, and are left out", count - len(dataset), given)
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            raise UserError(
                f"{flag} {column} is no column of {given}; its columns are: {', '.join(dataset.column_names)}. "
                "In a folder, captions stand in a metadata.jsonl with the keys file_name and text."
            )
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise UserError(
            f"--image_column {image_column} of {given} holds {dataset.features[image_column]}, not pictures. "
            "Give the column that does."
        )
    if len(dataset) == 0:
        raise UserError(f"{given} holds no pictures. Put some there, with a metadata.jsonl.")
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def list_files(directory: str) -> list[Path]:
    """Return the files in a folder and in the folders below it, but for hidden ones and those in hidden folders."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(directory).parts)]


def _folder_cache(directory: str, files: list[Path], cache_dir: str | None) -> str:
    # datasets knows a file by its path and time of change; a caption may change and the time come back.
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in files if path.name.startswith("metadata.")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(directory)} {len(content)} ".encode() + content)
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"metadata-{digest.hexdigest()}")


def draw_samples(dataset: datasets.Dataset, count: int | None, seed: int) -> tuple[datasets.Dataset, list[int]]:
    """Return so many rows, drawn by the seed as `Dataset.shuffle` draws, and where they were; None leaves all."""
    if count is None:
        return dataset, list(range(len(dataset)))
    order = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()
    return dataset.select(order), order


def read_captions(column: list, pictures: list[Picture] | None = None) -> list[list[str]]:
    """Return every picture's captions, one or several.

    Args:
        column: of the captions.
        pictures: of the same rows, for the error.

    Raises:
        UserError: one is neither a text nor a list of texts.
    """
    captions = []
    for position, value in enumerate(column):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            name = f"{pictures[position].position} ({pictures[position].name})" if pictures else position
            raise UserError(
                f"Picture {name} has {value!r} in the caption column, neither a text nor a list of texts. "
                "Correct its line in the metadata, or give another --caption_column."
            )
        captions.append(texts)
    return captions


# --- checking and decoding pictures ---


def read_bytes(record: dict) -> bytes:
    """Return the file behind an undecoded entry of an image column."""
    return record["bytes"] if record["bytes"] is not None else Path(record["path"]).read_bytes()


def decode(content: bytes) -> Image.Image:
    """Return a picture upright, in RGB, transparency over white and 16 bits scaled to 8; decodes it wholly."""
    image = Image.open(io.BytesIO(content))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def inspect_pictures(
    column: datasets.Column,
    memory_dir: Path,
    on_picture: Callable[[], object] = lambda: None,
    positions: list[int] | None = None,
) -> list[Picture]:
    """Decode every picture once, and return what there is to know of it, the reason included where it cannot be.

    What was found is remembered in `memory_dir` by the content of the files, so the next run only reads them.

    Args:
        column: the undecoded image column.
        memory_dir: where to remember; made if missing.
        on_picture: called after each picture.
        positions: where the rows were in the data set; None if they are all of it.
    """
    positions = list(range(len(column))) if positions is None else positions
    with ThreadPoolExecutor() as pool:
        known = list(pool.map(partial(_digest_picture, column), range(len(column)), positions))
        digests = sorted(((picture.digest, picture.error) for picture in known), key=str)
        everything = hashlib.blake2b(repr([PIL.__version__, digests]).encode(), digest_size=16)
        file = memory_dir / f"pictures-{everything.hexdigest()}.json"
        remembered = read_memory(file)
        pictures = list(pool.map(partial(_look_at, column, remembered, on_picture), range(len(column)), known))
    if not remembered:
        facts = {p.digest: [p.height_px, p.width_px, p.error] for p in pictures if p.digest}
        write_atomically(file, json.dumps(facts).encode())
    return pictures


# A record of a hub dataset holds the whole file: it is looked up one at a time, and no more often than needed.
def _digest_picture(column: datasets.Column, row: int, position: int) -> Picture:
    record, digest, error = column[row], "", None
    try:
        digest = hashlib.blake2b(read_bytes(record), digest_size=16).hexdigest() if record else ""
        error = None if record else "is missing"
    except OSError as reason:
        error = f"cannot be read: {reason.strerror}"
    return Picture((record or {}).get("path") or f"picture {position}", digest, 0, 0, error, position)


def _look_at(
    column: datasets.Column, remembered: dict, on_picture: Callable[[], object], row: int, picture: Picture
) -> Picture:
    fact = [0, 0, picture.error] if picture.error else remembered.get(picture.digest)
    if fact is None:
        try:
            width, height = decode(read_bytes(column[row])).size
            fact = [height, width, None]
        except UnidentifiedImageError:
            fact = [0, 0, "is no picture of a known format"]
        except Exception as reason:  # Pillow's plugins raise anything on a broken file
            fact = [0, 0, f"cannot be decoded: {str(reason) or type(reason).__name__}"]
    on_picture()
    height_px, width_px, error = fact
    return picture._replace(height_px=height_px, width_px=width_px, error=error)


def leave_out_broken(
    dataset: datasets.Dataset, pictures: list[Picture], skip: bool
) -> tuple[datasets.Dataset, list[Picture]]:
    """Return the rows and pictures that can be used, and warn of the others if they are to be skipped.

    Raises:
        UserError: some cannot be used and are not to be skipped, or none can be used.
    """
    bad = [picture for picture in pictures if picture.error]
    if bad and not skip:
        listed = "".join(f"\n  {picture.name} {picture.error}" for picture in bad)
        raise UserError(
            f"{len(bad)} of {len(pictures)} pictures cannot be used. Mend or remove them, or leave them out with "
            f"--skip_bad_images:{listed}"
        )
    if not bad:
        return dataset, pictures
    logger.warning("--skip_bad_images leaves out %d of %d pictures", len(bad), len(pictures))
    good = [row for row, picture in enumerate(pictures) if not picture.error]
    if not good:
        raise UserError("Not one picture can be used. Give others.")
    return dataset.select(good), [pictures[row] for row in good]


def data_digest(pictures: list[Picture], captions: list[list[str]]) -> str:
    """Return a digest of what the samples are drawn from: the pictures' contents and captions, in order."""
    content = json.dumps([[picture.digest for picture in pictures], captions])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


# --- sizes and crops ---


def resized_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side at `resolution` px, rounded as torchvision's Resize rounds."""
    short, long = min(height, width), max(height, width)
    scaled = int(resolution * long / short)
    return (scaled, resolution) if height > width else (resolution, scaled)


def center_crop_top_left(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Return the (top, left) of the center crop of a resized picture, in px."""
    return tuple(max(0, round((side - resolution) / 2.0)) for side in size)


def crop_pixels(
    image: Image.Image, resolution: int, interpolation: str, flip: bool, top_left: tuple[int, int]
) -> torch.Tensor:
    """Return the picture resized, flipped if asked for, and cropped: (3, resolution, resolution), fp32 in [-1, 1]."""
    height, width = resized_size(image.height, image.width, resolution)
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    top, left = top_left
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, resolution, resolution), uint8
    return pixels.float() / 127.5 - 1


# --- order and randomness ---


def derive_seed(*key) -> int:
    """Return a 64-bit seed from a key of numbers and strings, equal on every machine and in every process."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*key) -> torch.Generator:
    """Return a CPU generator seeded from a key."""
    return torch.Generator().manual_seed(derive_seed(*key))


def sample_stream(
    dataset_size: int,
    seed: int,
    batch_size: int,
    accumulation_steps: int,
    num_processes: int,
    process_index: int,
    first_sample: int,
    num_steps: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield this process's micro-batches of the next `num_steps` steps, as (epoch, index) pairs.

    The samples are one endless stream of permutations, one for each epoch. The steps go on at `first_sample` of it,
    and each takes as many as all processes and micro-batches together. A batch may span two epochs; nothing is
    padded, dropped or repeated.
    """
    epoch_of_order, order = None, None
    micro_batches_per_step = accumulation_steps * num_processes
    for step in range(num_steps):
        for micro_step in range(accumulation_steps):
            micro_batch = step * micro_batches_per_step + micro_step * num_processes + process_index
            samples = []
            start = first_sample + micro_batch * batch_size
            for position in range(start, start + batch_size):
                epoch, place = divmod(position, dataset_size)
                if epoch != epoch_of_order:
                    order = torch.randperm(dataset_size, generator=generator_for("order", seed, epoch)).tolist()
                    epoch_of_order = epoch
                samples.append((epoch, order[place]))
            yield samples


class TrainingSamples(torch.utils.data.Dataset):
    """The samples of a run, looked up by (epoch, index), ready for the loss but for what must be encoded in the loop.

    With the caches `latents` (by a picture's digest) and `prompts` (by caption) a sample holds `latents` and the
    prompt's embeddings; without them it holds `pixel_values` and `latent_noise`, or `caption`, which the loop encodes.
    """

    def __init__(
        self,
        column: datasets.Column,
        pictures: list[Picture],
        captions: list[list[str]],
        latents: Mapping[str, dict[str, torch.Tensor]] | None,
        prompts: Mapping[str, dict[str, torch.Tensor]] | None,
        *,
        seed: int,
        resolution: int,
        interpolation: str,
        center_crop: bool,
        random_flip: bool,
        scaling_factor: float,
        noise_offset: float,
        num_train_timesteps: int,
    ):
        self.column, self.pictures, self.captions = column, pictures, captions
        self.latents, self.prompts = latents, prompts
        self.seed, self.resolution, self.interpolation = seed, resolution, interpolation
        self.center_crop, self.random_flip = center_crop, random_flip
        self.scaling_factor, self.noise_offset = scaling_factor, noise_offset
        self.num_train_timesteps = num_train_timesteps

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        picture, captions = self.pictures[index], self.captions[index]
        side = self.resolution // 8

        # Everything is drawn, in this order, whether used or not: no flag changes what another one draws.
        generator = generator_for("sample", self.seed, epoch, index)
        flip_draw, top_draw, left_draw, caption_draw = torch.rand(4, generator=generator).tolist()
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        latent_noise = torch.randn(4, side, side, generator=generator)
        noise = torch.randn(4, side, side, generator=generator)
        noise += self.noise_offset * torch.randn(4, 1, 1, generator=generator)

        flip = self.random_flip and flip_draw < 0.5
        size = resized_size(picture.height_px, picture.width_px, self.resolution)
        if self.center_crop:
            top_left = center_crop_top_left(size, self.resolution)
        else:
            free = (size[0] - self.resolution + 1, size[1] - self.resolution + 1)
            top_left = (int(top_draw * free[0]), int(left_draw * free[1]))
        time_ids = compute_time_ids(
            (picture.height_px, picture.width_px), top_left, (self.resolution, self.resolution)
        )
        sample = {
            "name": picture.name,
            "noise": noise,
            "timesteps": timestep,
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),
        }
        if self.latents is not None:
            row = self.latents[picture.digest]  # mean and std (2, 4, side, side): as it is, and flipped
            sample["latents"] = (row["mean"][int(flip)] + row["std"][int(flip)] * latent_noise) * self.scaling_factor
        else:
            image = decode(read_bytes(self.column[index]))
            sample["pixel_values"] = crop_pixels(image, self.resolution, self.interpolation, flip, top_left)
            sample["latent_noise"] = latent_noise
        caption = captions[int(caption_draw * len(captions))]
        sample |= self.prompts[caption] if self.prompts is not None else {"caption": caption}
        return sample


def collate(samples: list[dict]) -> dict:
    """Stack the tensors of the samples, and list what is no tensor."""
    return {
        key: torch.stack([sample[key] for sample in samples]) if torch.is_tensor(value) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def prefetched(batches: Iterator[dict], depth: int = 2) -> Iterator[dict]:
    """Yield the batches while a thread prepares the next ones, so that the card need not wait for them."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(depth))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch

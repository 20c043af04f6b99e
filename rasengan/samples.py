"""The samples of a run: their order, and what is drawn for each.

A sample is a pure function of (seed, epoch, place among the trained pictures): its place in the order, flip, crop,
caption, latent, noise and timestep come from CPU generators seeded by these, never from a global one. Hence a resumed
run, another number of processes or another split into micro-batches sees the same samples.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from rasengan import sdxl
from rasengan.imaging import (
    Picture,
    Size,
    center_crop_top_left,
    crop_pixels,
    crop_size,
    decode,
    read_again,
    resized_size,
)
from rasengan.loader import collate


def derive_seed(*key) -> int:
    """Return a 64-bit seed from a key of numbers and strings, equal on every machine and in every process."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*key) -> torch.Generator:
    """Return a CPU generator seeded from a key."""
    return torch.Generator().manual_seed(derive_seed(*key))


def epoch_order(seed: int, epoch: int, buckets: list[int], global_batch: int) -> list[int]:
    """Return the order of an epoch's samples: a permutation, in which a step's samples are of one bucket.

    What a bucket has beyond full steps is left to the epoch's first and last steps, which mix buckets: as the steps
    go on across epochs, the first ones complete the step that the epoch before has begun.

    Args:
        seed: the run's.
        epoch: which one.
        buckets: of each sample; all alike where there are none, which gives a plain permutation.
        global_batch: samples of a step.
    """
    generator, size = generator_for("order", seed, epoch), len(buckets)
    order = torch.randperm(size, generator=generator).tolist()
    if len(set(buckets)) == 1:
        return order
    by_bucket = defaultdict(list)
    for index in order:
        by_bucket[buckets[index]].append(index)
    steps, rest = [], []
    for samples in by_bucket.values():
        full = len(samples) // global_batch * global_batch
        steps += [samples[start : start + global_batch] for start in range(0, full, global_batch)]
        rest += samples[full:]
    steps = [steps[place] for place in torch.randperm(len(steps), generator=generator).tolist()]
    begun = -epoch * size % global_batch
    while len(rest) < begun and steps:
        rest += steps.pop()
    return [*rest[:begun], *(index for samples in steps for index in samples), *rest[begun:]]


def sample_stream(
    buckets: list[int],
    seed: int,
    batch_size: int,
    accumulation_steps: int,
    num_processes: int,
    process_index: int,
    first_sample: int,
    num_steps: int,
) -> Iterator[list[tuple[int, int]]]:
    """Yield this process's micro-batches of the next `num_steps` steps, as (epoch, index) pairs.

    The samples are one endless stream of permutations, one for each epoch, as `epoch_order` gives it of `buckets`.
    The steps go on at `first_sample` of it, and each takes as many as all processes and micro-batches together. A
    step may span two epochs; nothing is padded, dropped or repeated. A micro-batch that mixes buckets comes in parts.
    """
    epoch_of_order, order = None, None
    micro_batches_per_step = accumulation_steps * num_processes
    global_batch = batch_size * micro_batches_per_step
    for step in range(num_steps):
        for micro_step in range(accumulation_steps):
            micro_batch = step * micro_batches_per_step + micro_step * num_processes + process_index
            samples = []
            start = first_sample + micro_batch * batch_size
            for position in range(start, start + batch_size):
                epoch, place = divmod(position, len(buckets))
                if epoch != epoch_of_order:
                    order = epoch_order(seed, epoch, buckets, global_batch)
                    epoch_of_order = epoch
                samples.append((epoch, order[place]))
            samples.sort(key=lambda sample: buckets[sample[1]])
            for _, part in groupby(samples, key=lambda sample: buckets[sample[1]]):
                yield list(part)


class TrainingSamples(torch.utils.data.Dataset):
    """The samples of a run, looked up by (epoch, index), ready for the loss but for what must be encoded in the loop.

    With the caches `latents` (by a picture's digest) and `prompts` (by caption) a sample holds `latents` and the
    prompt's embeddings; without them it holds `pixel_values` and `latent_noise`, or `caption`, which the loop encodes.
    """

    def __init__(
        self,
        column: Sequence[dict],
        pictures: list[Picture],
        captions: list[list[str]],
        latents: Mapping[str, dict[str, torch.Tensor]] | None,
        prompts: Mapping[str, dict[str, torch.Tensor]] | None,
        *,
        rows: list[int] | None = None,
        seed: int,
        sizes: list[Size],
        interpolation: str,
        center_crop: bool,
        random_flip: bool,
        scaling_factor: float,
        noise_offset: float,
        num_train_timesteps: int,
    ):
        self.column, self.pictures, self.captions = column, pictures, captions
        self.latents, self.prompts = latents, prompts
        self.rows = list(range(len(pictures))) if rows is None else rows  # of the pictures that are drawn from
        self.crops = [crop_size(picture.height_px, picture.width_px, sizes) for picture in pictures]
        self.seed, self.sizes, self.interpolation = seed, sizes, interpolation
        self.center_crop, self.random_flip = center_crop, random_flip
        self.scaling_factor, self.noise_offset = scaling_factor, noise_offset
        self.num_train_timesteps = num_train_timesteps

    def __len__(self) -> int:
        return len(self.rows)

    def buckets(self) -> list[int]:
        """Return the number of each sample's size: those of one number can be of one batch."""
        numbers = {size: number for number, size in enumerate(self.sizes)}
        return [numbers[self.crops[row]] for row in self.rows]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        shape = (4, *(side // 8 for side in self.crops[self.rows[index]]))

        # Everything is drawn, in this order, whether used or not: no flag changes what another one draws.
        generator = generator_for("sample", self.seed, epoch, index)
        flip_draw, top_draw, left_draw, caption_draw = torch.rand(4, generator=generator).tolist()
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        latent_noise = torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        noise += self.noise_offset * torch.randn(4, 1, 1, generator=generator)

        flip = self.random_flip and flip_draw < 0.5
        crop_draws = None if self.center_crop else (top_draw, left_draw)
        return self.assemble(self.rows[index], timestep, noise, latent_noise, caption_draw, crop_draws, flip)

    def assemble(
        self,
        row: int,
        timestep: torch.Tensor,
        noise: torch.Tensor,
        latent_noise: torch.Tensor,
        caption_draw: float,
        crop_draws: tuple[float, float] | None = None,
        flip: bool = False,
    ) -> dict:
        """Return the sample of a picture from what was drawn for it.

        Args:
            row: of the picture.
            timestep: (), int64.
            noise: (4, h, w), the crop's size / 8.
            latent_noise: of the same shape; the latent is its mean and this many standard deviations.
            caption_draw: in [0, 1), which of its captions.
            crop_draws: in [0, 1), how far from the top and from the left; None for the center.
            flip: mirror it.
        """
        picture, captions, crop = self.pictures[row], self.captions[row], self.crops[row]
        size = resized_size(picture.height_px, picture.width_px, crop)
        if crop_draws is None:
            top_left = center_crop_top_left(size, crop)
        else:
            lengths = zip(crop_draws, size, crop, strict=True)
            top_left = tuple(int(draw * (length - kept + 1)) for draw, length, kept in lengths)
        time_ids = sdxl.compute_time_ids((picture.height_px, picture.width_px), top_left, crop)
        sample = {
            "name": picture.name,
            "noise": noise,
            "timesteps": timestep,
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),
        }
        if self.latents is not None:
            moments = self.latents[picture.digest]  # mean and std (2, 4, h, w): as it is, and flipped
            latents = moments["mean"][int(flip)] + moments["std"][int(flip)] * latent_noise
            sample["latents"] = latents * self.scaling_factor
        else:
            image = decode(read_again(self.column[row], picture.digest))
            sample["pixel_values"] = crop_pixels(image, crop, self.interpolation, flip, top_left)
            sample["latent_noise"] = latent_noise
        caption = captions[int(caption_draw * len(captions))]
        sample |= self.prompts[caption] if self.prompts is not None else {"caption": caption}
        return sample


def first_batch(training_set: TrainingSamples, size: int) -> dict:
    """Return a batch of the first pictures of the largest size, as many as are asked for, to try a step on."""
    crops = [training_set.crops[row] for row in training_set.rows]
    largest = max(crops, key=math.prod)
    alike = [index for index, crop in enumerate(crops) if crop == largest]
    return collate([training_set[0, alike[index % len(alike)]] for index in range(size)])

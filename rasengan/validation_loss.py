"""The model's loss on pictures that are held out of training.

Each picture is met with the same noise, latent sample, caption and timesteps every time, one timestep in each band of
the schedule: what changes between two measurements is the model alone. They are drawn from CPU generators seeded by
the run's seed and the picture's content, so that another place in the data set changes nothing either.
"""

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from rasengan import memory
from rasengan.adapters import DIFFUSERS_FILE
from rasengan.checkpoint import BEST_FILE, BEST_FOLDER, is_loss
from rasengan.files import read_json_or_empty
from rasengan.imaging import PictureChanged
from rasengan.loader import collate, prefetched
from rasengan.processes import add_up
from rasengan.samples import TrainingSamples, generator_for
from rasengan.stopping import Interrupted


logger = logging.getLogger(__name__)

# A loss hangs on the timestep far more than on the picture: without bands the draw would decide the mean.
BANDS = 4
LOSS = "validation_loss"
NOT_MEASURED = "The validation loss after the last step was not measured"
# Settings that a resume may change, and after which another loss is measured, the base's too.
COMPARABLE = ("validation_split", "base_digest", "base_quantization", "center_crop", "image_interpolation_mode")


def band_edges(num_train_timesteps: int) -> list[tuple[int, int]]:
    """Return the bands of the schedule as (first timestep, first of the next band)."""
    return [(num_train_timesteps * n // BANDS, num_train_timesteps * (n + 1) // BANDS) for n in range(BANDS)]


def fixed_sample(held_out: TrainingSamples, index: int, band: int) -> dict:
    """Return a held-out picture's sample in a band: never mirrored, its crop the center, its noise without an offset.

    Args:
        held_out: the samples whose rows are held out.
        index: which of them.
        band: which of `BANDS`.
    """
    row = held_out.rows[index]
    shape = (4, *(side // 8 for side in held_out.crops[row]))
    generator = generator_for("validation", held_out.seed, held_out.pictures[row].digest, band)
    caption_draw = torch.rand((), generator=generator).item()
    timestep = torch.randint(*band_edges(held_out.num_train_timesteps)[band], (), generator=generator)
    latent_noise = torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    return held_out.assemble(row, timestep, noise, latent_noise, caption_draw)


def named_means(losses: torch.Tensor, num_train_timesteps: int) -> dict[str, float]:
    """Return the mean of losses (pictures, BANDS), of all and of each band, by the names of their plots."""
    by_band = losses.mean(dim=0)
    edges = band_edges(num_train_timesteps)
    named = {f"{LOSS}/t{low}-{end - 1}": loss for (low, end), loss in zip(edges, by_band.tolist(), strict=True)}
    return {LOSS: by_band.mean().item()} | named


class ValidationLoss:
    """Measures the loss of the held-out pictures, and knows the base's, the last and the lowest.

    `record` holds these as JSON values, `base`, `last`, `best` and `best_step`, for a checkpoint to keep.
    """

    def __init__(
        self,
        held_out: TrainingSamples,
        encode: Callable[[Iterator[dict]], Iterator[dict]],
        compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        make_room: Callable[[], object],
        *,
        device: torch.device,
        share: tuple[int, int],
        batch_size: int,
        every: int,
        should_stop: Callable[[], bool] = lambda: False,
        record: dict | None = None,
    ):
        """Take what is measured, and how.

        Args:
            held_out: the samples whose rows are held out; of none, no step is due.
            encode: brings batches to the device, as `loader.encode_in_loop` does.
            compute: returns the losses (B,) of a batch, as `step.compute_losses` does.
            make_room: gives the memory back that training keeps; called if the rest does not suffice.
            device: of the losses.
            share: this process's number, and how many processes measure together.
            batch_size: samples at once.
            every: optimizer steps between two measurements.
            should_stop: says whether the run was asked to end.
            record: of the run that is resumed.
        """
        self.held_out, self.encode, self.compute, self.make_room = held_out, encode, compute, make_room
        self.device, self.share, self.batch_size, self.every = device, share, batch_size, every
        self.should_stop = should_stop
        self.record = dict(record or {"base": None, "last": None, "best": None, "best_step": None})

    def due(self, global_step: int) -> bool:
        """Say whether to measure after so many steps, the last one apart."""
        return len(self.held_out) > 0 and global_step > 0 and global_step % self.every == 0

    def measure_base(self) -> dict[str, float]:
        """Return the loss as `measure` does; the models run without their adapters now."""
        values = self.measure()
        self.record["base"] = values[LOSS]
        return values

    def measure_tuned(self, global_step: int) -> dict[str, float]:
        """Return the loss as `measure` does, after so many steps, and remember it."""
        values = self.measure()
        self.record["last"] = values[LOSS]
        best = math.inf if self.record["best"] is None else self.record["best"]
        if values[LOSS] < best:  # not so for a NaN
            self.record |= {"best": values[LOSS], "best_step": global_step}
        return values

    def is_best(self, global_step: int) -> bool:
        """Say whether the loss after so many steps, the last measured, is the lowest so far."""
        return (self.record["best_step"], self.record["best"]) == (global_step, self.record["last"])

    def measure(self) -> dict[str, float]:
        """Return the mean loss by the names of its plots: of all samples, and of each band of timesteps.

        As `measure_each` otherwise.
        """
        return named_means(self.measure_each(), self.held_out.num_train_timesteps)

    @torch.no_grad()
    def measure_each(self) -> torch.Tensor:
        """Return the loss of each picture in each band, (pictures, BANDS), fp64 on the CPU.

        The models are in evaluation mode already. All processes call it together; the boundaries of the batches hang
        on the batch size and the buckets alone, and the sum is taken in one order, so that any number of processes
        gives the same. Draws from no global generator, and leaves no memory taken.

        Raises:
            UserError: one sample alone does not fit, or another process has ended.
            Interrupted: a process was asked to end.
        """
        keys = [(index, band) for index in range(len(self.held_out)) for band in range(BANDS)]
        batches = self._batches(keys)
        number, processes = self.share
        mine = range(number, len(batches), processes)
        # Behind the losses stands whether a process was asked to end.
        losses = torch.zeros(len(keys) + 1, dtype=torch.float64, device=self.device)
        collated = (collate([fixed_sample(self.held_out, *keys[place]) for place in batches[n]]) for n in mine)
        size = self.batch_size
        for n, batch in zip(mine, prefetched(collated), strict=True):
            if self.should_stop():
                losses[-1] = 1
                break
            found, size = self._losses(batch, size)
            losses[torch.tensor(batches[n], device=self.device)] = found
        add_up(losses)  # each is zero on all processes but one
        memory.give_back()
        losses = losses.cpu()
        if losses[-1]:
            raise Interrupted
        return losses[:-1].view(-1, BANDS)

    def _batches(self, keys: list[tuple[int, int]]) -> list[list[int]]:
        """Return the places of the keys that are met together, which are of one bucket."""
        buckets, places = self.held_out.buckets(), {}
        for place, (index, _) in enumerate(keys):
            places.setdefault(buckets[index], []).append(place)
        return [
            alike[start : start + self.batch_size]
            for alike in places.values()
            for start in range(0, len(alike), self.batch_size)
        ]

    def _losses(self, batch: dict, size: int) -> tuple[torch.Tensor, int]:
        """Return the losses (B,) of a batch, and how many samples were taken at once, which is as many as fit."""
        total, made_room = len(batch["name"]), False
        while True:
            parts = ({k: v[start : start + size] for k, v in batch.items()} for start in range(0, total, size))
            try:
                return torch.cat([self.compute(part).double() for part in self.encode(parts)]), size
            except torch.OutOfMemoryError as error:
                traceback.clear_frames(error.__traceback__)  # they hold what was computed
                if made_room and size == 1:
                    raise memory.DoesNotFit(
                        "The validation loss of one picture does not fit into the card's memory. Lower --resolution, "
                        "or train without --validation_split."
                    ) from error
                size, made_room = (max(1, min(size, total) // 2) if made_room else size), True
            self.make_room()

    @contextmanager
    def after_last_step(self) -> Iterator[None]:
        """Measure inside of this once the training is over: where that cannot be, warn, and let the run end well.

        Raises:
            UserError: a picture was changed, or does not fit, and other processes wait for this one.
        """
        try:
            yield
        except Interrupted:
            logger.warning("%s, since the run was to end", NOT_MEASURED)
        except (PictureChanged, memory.DoesNotFit) as error:
            if self.share[1] > 1:
                raise
            logger.warning("%s: %s", NOT_MEASURED, error)

    # --- what is said of it ---

    def shown(self) -> dict[str, str]:
        """Return what the progress bar shows."""
        return {} if self.record["last"] is None else {LOSS: f"{self.record['last']:.4f}"}

    def summary(self) -> str:
        """Return the base's loss beside the tuned model's, once both were measured."""
        base, last, best, best_step = (self.record[name] for name in ("base", "last", "best", "best_step"))
        lowest = "" if best is None else f"; the lowest was {best:.4f}, after step {best_step}"
        lowest += ", above the base's: lower --learning_rate" * (best is not None and best > base)
        change = f"{100 * (last / base - 1):+.1f} %"
        return (
            f"Validation loss of {len(self.held_out)} held-out pictures: base {base:.4f}, tuned {last:.4f} "
            f"({change}){lowest}"
        )


def resumed_record(state: dict, settings: Mapping[str, object], output_dir: Path | None) -> dict | None:
    """Return the record of a checkpoint's state, where its losses compare with those to come.

    Args:
        state: of the checkpoint, or empty.
        settings: of the run, `COMPARABLE` among them.
        output_dir: where `best/` is; None where none is kept. What it holds may have been measured after the
            checkpoint was written: it counts too. If it is not there, or its loss is higher than the checkpoint's,
            the lowest begins anew, which is warned of.
    """
    record = state.get("validation_losses")
    if record is None or any(state.get(name, settings[name]) != settings[name] for name in COMPARABLE):
        return None
    if output_dir is None:
        return record
    folder = output_dir / BEST_FOLDER
    kept = read_json_or_empty(folder / BEST_FILE) if (folder / DIFFUSERS_FILE).is_file() else {}
    step, loss = kept.get("step"), kept.get("loss")
    # There is none, or it was damaged.
    if type(step) is not int or not is_loss(loss):
        step = loss = math.inf
    known = math.inf if record["best"] is None else record["best"]
    if loss < known:
        return record | {"best": loss, "best_step": step}
    if loss > known:
        logger.warning(
            "%s does not hold the adapter of step %d, which had the lowest validation loss: --save_best begins anew",
            *(folder, record["best_step"]),
        )
        return record | {"best": None, "best_step": None}
    return record

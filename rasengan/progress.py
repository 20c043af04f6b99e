"""What a run's steps did: read from the card for several of them together, since each reading waits for it."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from rasengan import memory
from rasengan.diagnosis import SKIPPED


logger = logging.getLogger(__name__)

# One step without a finite loss may be its samples' fault; so many in a row are not.
STUCK = 3


class Progress:
    """The losses, gradient norms and speed of the steps since the last reading."""

    def __init__(
        self, first_step: int, global_batch: int, device: torch.device, kept: Mapping[str, int] | None = None
    ):
        """Begin after `first_step` optimizer steps of `global_batch` samples; `kept` as a checkpoint has it."""
        self.first_step = self.step = first_step
        self.global_batch, self.device = global_batch, device
        self.unread, self.started_s = [], time.perf_counter()
        self.train_loss, self.images_per_second = math.nan, 0.0
        kept = kept or {}
        self.first_sample = kept.get("samples_seen", 0)
        self.skipped_steps, self.skipped_in_a_row = (kept.get(name, 0) for name in SKIPPED)

    def add(self, step_loss: torch.Tensor, grad_norm: torch.Tensor) -> int:
        """Take what a step did, without waiting for it; return how many wait.

        Args:
            step_loss: a scalar on the device, the same on all processes.
            grad_norm: likewise.
        """
        self.unread.append(torch.stack([step_loss, grad_norm]))
        return len(self.unread)

    def read(self) -> dict[int, dict[str, float]]:
        """Return what the steps since the last reading did, by step, for the trackers."""
        rows = torch.stack(self.unread).tolist()
        now_s = time.perf_counter()
        self.images_per_second = len(rows) * self.global_batch / (now_s - self.started_s)
        self.started_s = now_s
        self.unread.clear()
        found = {}
        for self.train_loss, grad_norm in rows:
            self.step += 1
            found[self.step] = {"train_loss": self.train_loss, "grad_norm": grad_norm}
            was_skipped = not math.isfinite(grad_norm)  # the weights were left as they were
            self.skipped_steps += was_skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        found[self.step] |= {
            "images_per_second": self.images_per_second,
            "peak_reserved_gib": memory.peak_reserved_gib(self.device),
            "host_peak_rss_gib": memory.host_peak_rss_gib(),
            "skipped_steps": self.skipped_steps,
        }
        return found

    def log(self, accelerator: Accelerator) -> None:
        """Give what `read` returns to the trackers."""
        for step, values in self.read().items():
            accelerator.log(values, step=step)

    def steps(self) -> int:
        """Return how many optimizer steps are done, those that are not read yet included."""
        return self.step + len(self.unread)

    def kept(self) -> dict[str, int]:
        """Return what a checkpoint keeps: the samples seen, and the steps without a finite gradient.

        The latter are counted in all and of the last ones, up to the last reading.
        """
        samples_seen = self.first_sample + (self.steps() - self.first_step) * self.global_batch
        return {"samples_seen": samples_seen} | {name: getattr(self, name) for name in SKIPPED}

    def warn_of_skipped(self) -> None:
        """Say how many steps changed nothing: a few are how the gradient scaler finds its scale, many a bad run."""
        if self.skipped_steps:
            last = f", of which {self.skipped_in_a_row} are the last: compare checkpoints" * self.is_doubtful()
            logger.warning(
                "%d steps were skipped, because their gradients were not finite%s", self.skipped_steps, last
            )

    def is_doubtful(self) -> bool:
        """Say whether the last step changed nothing: whether the weights are any good is not known before one does."""
        return self.skipped_in_a_row > 0 or self._has_no_loss()

    def is_stuck(self) -> bool:
        """Say whether the last steps all had a loss that is not finite: what is saved now is no good checkpoint."""
        return self._has_no_loss() and self.skipped_in_a_row >= min(STUCK, self.step)

    def _has_no_loss(self) -> bool:
        return self.step > self.first_step and not math.isfinite(self.train_loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is no training, and does not count for the speed."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.started_s += time.perf_counter() - began_s

"""What a run says: in the terminal, and to accelerate's trackers, of which TensorBoard is one."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tqdm.auto import tqdm


# What TensorBoard's log needs to go on, about: the scalars of some thousand steps and a few small pictures.
LOG_BYTES = 2**20


class AboveBars(logging.Handler):
    """Writes to stderr, above the progress bars there, whose line it would go on with otherwise."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or nothing where nobody reads."""
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr)


def begin(names: list[str], speaks: bool) -> None:
    """Log our own words, and of the libraries only warnings.

    Args:
        names: of the loggers that are ours.
        speaks: this is the process of its machine that does.
    """
    logging.basicConfig(
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING if speaks else logging.ERROR,
        handlers=[AboveBars()],
    )
    for name in names:
        logging.getLogger(name).setLevel(logging.INFO if speaks else logging.ERROR)


def begin_trackers(accelerator: Accelerator, settings: Mapping[str, object], directory: Path) -> None:
    """Open the run's trackers, and show its settings in them.

    Args:
        accelerator: that has them.
        settings: without any token.
        directory: where TensorBoard's files are.

    Raises:
        OSError: they cannot be written; it names the place and what is needed.
    """
    shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
    hush_writers(directory)
    try:
        accelerator.init_trackers("text2image-fine-tune", config=shown)
    except OSError as error:
        name_log(error, directory)
        raise
    rows = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("arguments", f"| argument | value |\n|---|---|\n{rows}")


def log_each_loss(
    accelerator: Accelerator, names: list[str], losses: torch.Tensor, folder: str | None, global_step: int
) -> None:
    """Show the loss of each sample in the trackers.

    Args:
        accelerator: that has them.
        names: files of the samples.
        losses: theirs, (B,).
        folder: beside which the files are named; None takes the working directory.
        global_step: which one they are of, counted from 1.
    """
    shown = [os.path.relpath(name, folder or ".") for name in names]
    named = zip(shown, losses.tolist(), strict=True)
    accelerator.log({f"loss_for_{name}": loss for name, loss in named}, step=global_step)


def log_image(trackers: list[GeneralTracker], name: str, image: Image.Image, global_step: int) -> None:
    """Show a picture in those of accelerate's trackers that can."""
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(image), global_step, dataformats="HWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [image]}, step=global_step)


def name_log(error: OSError, directory: Path) -> None:
    """Say of an error of a tracker's, which names no file, where its files are and what they need."""
    error.filename, error.needed_bytes = error.filename or str(directory), LOG_BYTES


def hush_writers(directory: Path) -> None:
    """Keep TensorBoard's thread from printing a traceback where its file cannot be written.

    Its writer raises the same error again in the thread that gives it the next scalar.
    """
    show = threading.excepthook

    def show_others(end: threading.ExceptHookArgs) -> None:
        is_writer = type(end.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(end.exc_value, OSError)):
            show(end)
            return
        name_log(end.exc_value, directory)

    threading.excepthook = show_others

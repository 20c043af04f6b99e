"""How a script ends: a user's error as one line and an exit code, whatever raised it."""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from rasengan import TOKENS, UserError
from rasengan.files import lost_place
from rasengan.stopping import Terminated


# What TensorBoard's log needs to go on, about: the scalars of some thousand steps and a few small pictures.
LOG_BYTES = 2**20


def in_one_line(run: Callable[[], int | None], places: str, process: int = 0, once_mended: str = "") -> int:
    """Run a script's main function, and return its exit code; 2 after an error of the user, which stderr names.

    Args:
        run: returns an exit code, or None for 0.
        places: the flags of what is written, for an error that does not name the place.
        process: its number among those of a run, which all but the first say.
        once_mended: how to go on when a place can be written again, or after an interruption.
    """
    try:
        return run() or 0
    except UserError as error:
        text = str(error)
    except torch.OutOfMemoryError:
        text = (
            "The card's memory does not suffice. Free some, raise --vram_budget_gib if given, or give a smaller size."
        )
    except OSError as error:
        text = lost_place(error, places)
        if text is None:
            raise
        text = f"{text} {once_mended}".rstrip()
    except KeyboardInterrupt as end:
        number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
        say_ended(once_mended, number)
        return 128 + number  # as shells have it
    text = TOKENS.sub("(a token)", text)  # given where it does not belong
    text = text.encode(errors="backslashreplace").decode()  # half a character of a stranger's JSON
    sys.stderr.write(f"error{f' (process {process})' if process else ''}: {text}\n")
    return 2


def say_ended(once_mended: str, number: int) -> None:
    """Say on stderr which signal ended the process, and how to go on."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    sys.stderr.write(f"\nEnded by {by}. What was finished before is whole. {once_mended}".rstrip() + "\n")


def name_log(error: OSError, directory: Path) -> None:
    """Say of an error of a tracker's, which names no file, where its files are and what they need."""
    error.filename, error.needed_bytes = error.filename or str(directory), LOG_BYTES


def hush_writers(directory: Path) -> None:
    """Keep TensorBoard's thread from printing a traceback where its file cannot be written.

    Its writer raises the same error again in the thread that gives it the next scalar.

    Args:
        directory: where its file is.
    """
    show = threading.excepthook

    def show_others(end: threading.ExceptHookArgs) -> None:
        is_writer = type(end.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(end.exc_value, OSError)):
            show(end)
            return
        name_log(end.exc_value, directory)

    threading.excepthook = show_others

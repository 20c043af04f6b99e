"""How a script ends: a user's error as one line and an exit code, whatever raised it."""

import contextlib
import signal
import sys
from collections.abc import Callable

import torch

from rasengan import TOKENS, UserError
from rasengan.files import lost_place
from rasengan.stopping import Terminated


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
    """Say on stderr which signal ended the process, and how to go on; to nobody where the terminal is gone."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    with contextlib.suppress(OSError):
        sys.stderr.write(f"\nEnded by {by}. What was finished before is whole. {once_mended}".rstrip() + "\n")
        sys.stderr.flush()

"""Ending a run early without losing it: signals, a deadline, and the death of the launcher."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path


PR_SET_PDEATHSIG = 1  # of linux/prctl.h
UNHEARD_S = 3  # well below the 30 s after which a launcher kills


# By which several processes are started too, as a script or a module.
OTHER_LAUNCHERS = {"accelerate-launch", "accelerate.commands.launch", "torchrun"}
OTHER_LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch"}


class Interrupted(Exception):  # noqa: N818, since nothing went wrong
    """Raised on all processes together by long work between two steps, when one was asked to end meanwhile."""


class Terminated(KeyboardInterrupt):
    """Raised where SIGTERM came, as Ctrl-C's own is, so that what is open is closed."""


def raise_on_sigterm() -> None:
    """Let the first SIGTERM raise `Terminated`, and the next one end the process at once."""

    def end(number: int, _frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)


def end_while_waiting(say: Callable[[int], object]) -> None:
    """End the process by a SIGTERM or Ctrl-C that its handler does not hear, while it waits for others of its run.

    Python runs no handler during a wait in C++: there a thread reads the signal's number from a pipe. It leaves a
    handler that raises `UNHEARD_S` to end the process, and does nothing for a `Stopper`'s, which only asks for it.
    `say` is given the number before the process ends.

    Source: `signal.set_wakeup_fd`.
    """

    def watch() -> None:
        while True:
            number = os.read(receiver, 1)[0]
            asks = isinstance(getattr(signal.getsignal(number), "__self__", None), Stopper)
            if number in {signal.SIGTERM, signal.SIGINT} and not asks:
                time.sleep(UNHEARD_S)
                try:
                    say(number)
                finally:
                    os._exit(128 + number)

    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    # A forked child shares the pipe, and its signals are none of this process's.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(sender)


def tell(text: str) -> None:
    """Say something to the user, also from inside a signal's handler, and to nobody where the terminal is gone."""
    with contextlib.suppress(OSError):
        os.write(1, f"\n{text}\n".encode())


class Stopper:
    """Knows whether a run should end after this step, and why."""

    def __init__(self, minutes: float | None, began_s: float, tell: Callable[[str], object]):
        """Begin to watch for SIGTERM, Ctrl-C, and the end of some minutes since `began_s`; None sets no deadline.

        The first of them asks for an end, a Ctrl-C after it ends the process at once. Times are of the monotonic
        clock, which nothing sets forth or back.
        `tell` says to the user that a signal came, from inside the signal's handler, and how the run ended.
        """
        self.tell = tell
        self.deadline_s = None if minutes is None else began_s + 60 * minutes
        self.signal_number = None
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        # The handler of PyTorch's DataLoader raises in the middle of anything. It sees a dead worker by itself too.
        self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _note(self, number: int, _frame) -> None:
        if number == signal.SIGINT and self.signal_number is not None:
            os._exit(128 + number)
        again = " again" if number == signal.SIGINT else ""
        self.signal_number = self.signal_number or number
        name = signal.Signals(number).name
        self.tell(f"{name}: ending soon, with a checkpoint of the steps that are done. Ctrl-C{again} ends at once.")

    def asked(self) -> bool:
        """Say whether a signal asked for the end."""
        return self.signal_number is not None

    def due(self) -> bool:
        """Say whether the run should end."""
        past = self.deadline_s is not None and time.monotonic() >= self.deadline_s
        return past or self.signal_number is not None

    def reason(self) -> str:
        """Return why the run ends."""
        if self.signal_number is not None:
            return f"{signal.Signals(self.signal_number).name} was received"
        return "--max_train_minutes is over" if self.due() else "another process was asked to end"

    def exit_code(self) -> int:
        """Return what the process should end with: 0 after a deadline, as a shell counts signals otherwise."""
        return 0 if self.signal_number is None else 128 + self.signal_number

    def say_ended(self, when: str, resume_command: str, did_nothing: bool = False) -> None:
        """Say when the run ended, why, and how to go on; after a deadline also if it was before the first step."""
        too_short = ". The time was over before the first step: give it more" if did_nothing else ""
        why = f"{self.reason()}{too_short * (self.exit_code() == 0)}"
        self.tell(f"Ended {when}, since {why}. Go on with:\n  {resume_command}")

    def release(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def end_with_launcher(environment: Mapping[str, str]) -> None:
    """Ask the kernel for a SIGTERM when `accelerate launch` dies, which hands none on; does nothing without it.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    # Of the many that the launcher sets, one that nobody sets by hand.
    if "ACCELERATE_DYNAMO_USE_FULLGRAPH" in environment and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # The launcher is a Python program, whoever calls it: another parent took over, since it died before that.
        if not any("python" in word or "launch" in word for word in launcher_words()):
            os.kill(os.getpid(), signal.SIGTERM)


def resume_command(words: list[str], launcher: list[str]) -> str:
    """Return the command line that goes on with a run, without any token.

    Args:
        words: of the script, its own name first.
        launcher: of the process that started it, which may be `accelerate launch` or another launcher.
    """
    names = [Path(word).name for word in launcher]
    script = Path(words[0]).name
    before = names[: names.index(script)] if script in names else []
    if "launch" in before and any(name.startswith("accelerate") for name in before):
        words = ["accelerate", *launcher[before.index("launch") :]]
    elif OTHER_LAUNCHERS & set(before):
        words = launcher
    else:
        words = [sys.executable, *words]
    kept, skip = [], False
    for word in words:
        name = word.partition("=")[0]
        if not skip and name not in {"--resume_from_checkpoint", "--hub_token"}:
            kept.append(word)
        skip = not skip and name == word and name in {"--resume_from_checkpoint", "--hub_token"}
    return shlex.join([*kept, "--resume_from_checkpoint", "latest"])


def launcher_words() -> list[str]:
    """Return the command line of the process that started this one; empty where it cannot be seen."""
    file = Path(f"/proc/{os.getppid()}/cmdline")
    return file.read_text(errors="replace").split("\0")[:-1] if file.is_file() else []

"""One run to an output folder, one builder to a cache, one writer to a model."""

import contextlib
import glob
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rasengan import UserError
from rasengan.files import read_json_or_empty, remove_left_behind, sync_folder


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# The lock of a run on another machine, of which nothing else is known, is renewed so often, and stale after so long.
RENEWED_S, STALE_S, LOOKS_S = 20, 120, 2.0


def _process_start(pid: int) -> str | None:
    """Return when a process of this machine started, in the kernel's ticks; None if it is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _machine() -> str:
    """Return what tells this machine from others, and containers on it, whose process numbers are their own."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def check_held(folder: Path, flag: str = "--output_dir") -> None:
    """Check that this process, which locked a folder, still has it: a machine that was suspended may have lost it.

    Raises:
        UserError: it has not; `flag` gives another folder.
    """
    own = {"machine": _machine(), "pid": os.getpid(), "started": _process_start(os.getpid())}
    if reason := _lost(folder / LOCK_FILE, own):
        raise UserError(
            f"{reason} This run ends before it mixes its files with others. Wait for the other's end, or give another "
            f"{flag}."
        )


def _lost(file: Path, own: dict) -> str | None:
    """Say how a lock was lost that said this of its owner; None where it was not, or cannot be read for now."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # Of a folder that vanished, what is written next tells better.
        return f"{file}, by which this run had its folder, is gone." if file.parent.exists() else None
    except (OSError, ValueError):
        return None
    if isinstance(owner, dict) and any(owner.get(name) != value for name, value in own.items()):
        return f"{file.parent} was taken over by another run {_named(owner)}, since this one was not heard of."
    return None


def _named(owner: dict) -> str:
    known = "pid" in owner and "host" in owner
    return f"(process {owner['pid']} on {owner['host']})" if known else f"(its {LOCK_FILE} does not say which)"


class RunLock:
    """Keeps other runs out of an output folder, also on a mounted Drive, where the kernel's locks do not reach.

    The lock is a file that names the process. One that was killed leaves it behind: on the same machine that is seen
    from the process, on another one from the file's age.
    """

    def __init__(self, output_dir: Path, flag: str = "--output_dir"):
        """Lock a folder, which is made if it is missing; `flag` is what gives another one.

        Raises:
            UserError: another run has it.
        """
        self.file, self.flag, self.made = output_dir / LOCK_FILE, flag, []
        for folder in (output_dir, *output_dir.parents):
            if folder.exists():
                break
            self.made.append(folder)
        output_dir.mkdir(parents=True, exist_ok=True)
        self.owner = {
            **{"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()},
            **{"started": _process_start(os.getpid()), "token": uuid.uuid4().hex},
        }
        self.ended = threading.Event()
        try:
            self._take()
            threading.Thread(target=self._renew, daemon=True, name="run lock").start()
        except BaseException:  # a signal among them
            self.release()
            raise

    def _take(self) -> None:
        for _ in range(3):
            try:
                with open(self.file, "x") as file:
                    try:
                        json.dump(self.owner, file)
                        file.flush()
                    except BaseException as error:  # a full disk, say, which names no open file
                        self.file.unlink(missing_ok=True)
                        if isinstance(error, OSError):
                            error.filename, error.needed_bytes = str(self.file), len(json.dumps(self.owner))
                        raise
                return
            except FileExistsError:
                if self.file.is_dir():
                    raise UserError(f"{self.file} is a folder, where this run's lock is to be. Remove it.") from None
                self._remove_if_stale()
        raise UserError(f"{self.file} is made by another run again and again. Give another {self.flag}.")

    def _remove_if_stale(self) -> None:
        owner = read_json_or_empty(self.file)
        if not owner:  # its maker is about to say whose it is
            time.sleep(LOOKS_S)
            owner = read_json_or_empty(self.file)
        if owner.get("machine") == _machine() and isinstance(owner.get("pid"), int):
            started = _process_start(owner["pid"])
            alive = started is not None and started == owner.get("started")
        else:
            alive = self._is_renewed()
        if alive:
            owner = read_json_or_empty(self.file) or owner
            raise UserError(
                f"{self.file.parent} is in use by another run {_named(owner)}. Wait for its "
                f"end, or give another {self.flag}."
            )
        # Under another name first: another run may be quicker, and its lock must not be what is removed.
        taken = self.file.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.file.rename(taken)
            if read_json_or_empty(taken).get("token") != owner.get("token"):
                taken.rename(self.file)
                return
            taken.unlink()
            logger.warning("%s was left behind by a run that ended without warning, and is removed", self.file)

    def _is_renewed(self) -> bool:
        """Say whether the lock of another machine's run is alive, after waiting until it is renewed or stale."""
        before, told, began_s = self._time_of_change(), False, time.monotonic()
        # Of a clock that was set back since, the age alone would stay below any limit.
        while self._age_s() < STALE_S and time.monotonic() - began_s < STALE_S:
            if self._time_of_change() != before:
                return True
            if not told:
                logger.warning("%s is of a run on another machine: waiting whether it lives", self.file)
                told = True
            time.sleep(LOOKS_S)
        return False

    def _time_of_change(self) -> float | None:
        try:
            return self.file.stat().st_mtime
        except FileNotFoundError:
            return None

    def _age_s(self) -> float:
        # Both times are the file system's, whatever this machine's clock says.
        probe = self.file.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.file.stat().st_mtime
        except FileNotFoundError:
            return STALE_S
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        told = None
        while not self.ended.wait(RENEWED_S):
            if reason := _lost(self.file, {"token": self.owner["token"]}):
                if reason != told and not self.ended.is_set():
                    logger.error("%s", told := reason)
                continue
            with contextlib.suppress(OSError):  # a folder that vanished is told of when it is next needed
                os.utime(self.file)

    def release(self) -> None:
        """Let others have the folder; one that was made for nothing is removed again."""
        self.ended.set()
        with contextlib.suppress(OSError):
            if read_json_or_empty(self.file).get("token") == self.owner["token"]:
                self.file.unlink(missing_ok=True)
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # where something is in it
            for folder in self.made:
                folder.rmdir()


@contextmanager
def only_run(output_dir: Path, is_first: bool) -> Iterator[None]:
    """Hold the lock of a run's output folder, and clear it of what killed runs left; only the first process does."""
    lock = None
    try:
        if is_first:
            lock = RunLock(output_dir)
            remove_left_behind(output_dir, ".export-*", ".saving-*", ".removing-*")
        yield
    finally:
        if lock is not None:
            lock.release()


def _check_free(place: Path, flag: str) -> None:
    if os.path.lexists(place):  # also a link that leads nowhere
        raise UserError(f"{flag} {place} exists. Give a name that does not.")


@contextmanager
def only_writer(place: Path, flag: str) -> Iterator[Path]:
    """Give a path in a hidden folder to write to, and move what is written to its place once it is whole.

    The folder is locked, and cleared of what a killed run left there; at the end it is removed.

    Args:
        place: of a file or a folder that does not exist.
        flag: that named it.

    Raises:
        UserError: it exists, or another run writes it.
    """
    folder = place.with_name(f".{place.name}.unfinished")
    lock = RunLock(folder, flag)
    try:
        _check_free(place, flag)
        remove_left_behind(folder, glob.escape(place.name))
        yield folder / place.name
        check_held(folder, flag)
        _check_free(place, flag)  # a rename would replace what another program made meanwhile
        (folder / place.name).rename(place)
        sync_folder(place.parent)
    except UserError as error:  # the hidden folder is no user's matter
        raise UserError(str(error).replace(str(folder / place.name), str(place))) from error
    finally:
        if not _lost(lock.file, {"token": lock.owner["token"]}):
            remove_left_behind(folder, glob.escape(place.name))
        lock.release()
        with contextlib.suppress(OSError):  # another run has it by now
            folder.rmdir()


@contextmanager
def only_builder(directory: Path) -> Iterator[None]:
    """Let one run at a time build in a cache folder, and wait for one that does; readers need no lock.

    The kernel frees the lock of a process that ends, however it ends.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".build.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("Another run builds in %s: waiting for it", directory)
        lock.acquire()
    try:
        remove_left_behind(directory)
        yield
    finally:
        lock.release()

"""Files that are whole or absent."""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rasengan import UserError, first_line


# What a disk says that is full, read-only, over its quota, broken or gone: for the user to mend.
LOST_PLACES = {errno.EFBIG, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.ENOTCONN, errno.ESTALE}
BLOCK_BYTES = 4096  # of most file systems
# What it says of one name: missing, not allowed, or a folder where a file should be, or the other way round.
WRONG_NAMES = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
# What a name may have, so that a hidden one for what is not whole yet, longer by 34, is one of 255 at most.
MOST_NAME_BYTES = 200
# What a write that was killed leaves: `write_atomically` and the lock end their names so.
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}")


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until a folder's list of files is on the disk, where the file system can be asked for that."""
    with contextlib.suppress(OSError):  # FUSE and Windows have no such call
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def give_default_mode(path: Path) -> None:
    """Give a file the mode that a plain open() would: safetensors lets only its owner read what it writes."""
    with contextlib.suppress(PermissionError):  # a mounted share or stick may give all files one owner and one mode
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    # The system call can only read it by setting it, which other threads' files would feel.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and only then give it its own; makes its folder if missing."""
    with _written(path, content) as temporary:
        os.replace(temporary, path)


def write_if_free(path: Path, content: bytes) -> bool:
    """Write a file as `write_atomically` does, but over none, and say whether its name was free.

    Another process may take the name at any time: it is a hard link that fails then. Where the file system has none,
    as on FAT and some mounted shares, the name is looked at just before.
    """
    with _written(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
    return True


@contextlib.contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """Give a synced file beside a path, which the caller gives that path's name; it is removed if it is left over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder may have equal process ids.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        yield temporary
        sync_folder(path.parent)
    except OSError as error:
        # A full disk names no file, and the temporary name is no user's matter.
        error.filename, error.filename2, error.needed_bytes = str(path), None, len(content)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_behind(directory: Path, *patterns: str) -> None:
    """Remove what killed writes left in a folder that nobody else writes to, and what fits one of the patterns."""
    found = [path for path in directory.iterdir() if TEMPORARY.fullmatch(path.name)]
    for path in [*found, *(path for pattern in patterns for path in directory.glob(pattern))]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_json_or_empty(file: Path) -> dict:
    """Return what a JSON file holds; nothing where it is absent, damaged or no dictionary."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def lost_place(error: OSError, otherwise: str) -> str | None:
    """Say which place is full, read-only or gone, and what to do; None for an error that is no user's matter.

    Args:
        error: of a read or write.
        otherwise: what to call the place where the error names none.
    """
    # A name that is not there is the user's matter only where it is a name.
    if error.errno not in LOST_PLACES and not (error.errno in WRONG_NAMES and error.filename):
        return None
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else otherwise
    remedy = "Give a shorter name" if error.errno == errno.ENAMETOOLONG else "Make room, or mend it"
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT} and place != otherwise
    needs = ""
    if is_full:
        folder = Path(place) if Path(place).is_dir() else Path(place).parent
        needs = f" {room(folder, getattr(error, 'needed_bytes', None))}."
    return f"{place} cannot be written or read: {error.strerror}.{needs} {remedy}."


def room(folder: Path, needed_bytes: int | None) -> str:
    """Say how much a write takes, as far as that is known, and how much is free where it goes."""
    try:
        folder = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
        found, free = os.statvfs(folder), shutil.disk_usage(folder).free
        there = f"{_size(free)} are free there"
        if free > (needed_bytes or 0) and not found.f_favail and found.f_files:
            there += ", but no further files can be made"
    except OSError:
        there = f"{folder} cannot be looked at"
    # Of a new folder or name nothing is told: it takes a block.
    takes = f"{_size(BLOCK_BYTES)} at least" if needed_bytes is None else _size(needed_bytes)
    return f"It takes {takes}, and {there}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1024:,.1f} KiB" if size_bytes < 2**20 else f"{size_bytes / 2**20:,.1f} MiB"


def write_failure(error: Exception) -> str | None:
    """Return why a library could not write a file, or read it back; None for an error of another kind.

    Those written in Rust raise classes of their own, the tokenizers' a bare Exception.
    """
    if isinstance(error, OSError | SafetensorError) or "(os error " in str(error):
        return getattr(error, "strerror", None) or first_line(error).rstrip(".")
    return None


@contextlib.contextmanager
def writing(place: Path, remedy: str, needed_bytes: int | None = None) -> Iterator[None]:
    """Tell the user of a write within that fails.

    Args:
        place: what is written.
        remedy: what to do, a sentence.
        needed_bytes: that the write takes, told with what is free; None where it is not known.

    Raises:
        UserError: a disk or library could not write, or read back what was written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        needs = "" if needed_bytes is None else f" {room(place, needed_bytes)}."
        raise UserError(f"{place} cannot be written: {reason}.{needs} {remedy}") from error


def check_name(path: Path, flag: str) -> None:
    """Check that a name leaves room for that of an unfinished file beside it; `flag` is what named it.

    Raises:
        UserError: it does not.
    """
    size = len(os.fsencode(path.name))
    if size > MOST_NAME_BYTES:
        raise UserError(f"{flag}: the name {path.name} has {size} bytes. Give one of {MOST_NAME_BYTES} at most.")


def check_kinds(directory: Path, folders: dict[str, bool], flag: str) -> None:
    """Check that nothing stands in the way of what will be written into a folder; `flag` is what named it.

    Args:
        directory: the folder.
        folders: whether each name in it is to be a folder, or else a file.
        flag: for the error.

    Raises:
        UserError: one is there and of the other kind.
    """
    for name, is_folder in folders.items():
        path = directory / name
        if path.exists() and path.is_dir() != is_folder:
            is_now, will_be = ("a file", "a folder") if is_folder else ("a folder", "a file")
            raise UserError(f"{path} is {is_now}, where {will_be} is to be written. Move it, or give another {flag}.")


def check_writable(directory: Path, flag: str) -> None:
    """Check that a folder can be made, and a file written there, and leave nothing behind; `flag` is what named it.

    Raises:
        UserError: it cannot.
    """
    try:
        # Made and removed again, a missing folder would be pulled from under another process that checks it.
        there = next(folder for folder in (directory, *directory.parents) if folder.exists())
        for part in directory.relative_to(there).parts:
            (there / part).exists()  # fails for a name that the file system does not take
        # Not a name that `remove_left_behind` knows: another process of the run may be at that by now.
        probe = there / f".writable-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error.strerror}. Give another folder.") from error

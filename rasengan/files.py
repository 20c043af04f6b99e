"""Files that are whole or absent."""

import contextlib
import json
import os
import uuid
from pathlib import Path

from rasengan import UserError


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
    mask = os.umask(0o077)  # which can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and only then give it its own; makes its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder may have equal process ids.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_memory(file: Path) -> dict:
    """Return what a JSON file remembers; nothing where it is absent or damaged, since all of it can be found again."""
    try:
        remembered = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


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
        probe = there / f".writable.{uuid.uuid4().hex}"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {directory} cannot be written: {error.strerror}. Give another folder.") from error

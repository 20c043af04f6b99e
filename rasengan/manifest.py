"""The manifest of a checkpoint: the size and digest of each of its files, as they are read back from the disk."""

import hashlib
import json
import os
from pathlib import Path

from rasengan.files import give_default_mode, sync, sync_folder, write_atomically


MANIFEST_FILE = "manifest.json"


def digest_of(file: Path) -> str:
    """Return the digest of a file's content, as a manifest has it."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class HashedFile:
    """A file that is written from start to end, and the digest of what it was given, whatever a disk makes of it.

    Neither hashing nor writing keeps other threads of Python from running, as a copy in memory would. A write that
    fails is raised at the end, since `torch.save` would make another error of it.
    """

    def __init__(self, path: Path):
        self.file, self.error, self.hash = open(path, "wb"), None, hashlib.blake2b(digest_size=16)  # noqa: SIM115

    def write(self, content: bytes | memoryview) -> int:
        """Append to the file."""
        self.hash.update(content)
        try:
            self.file.write(content)
        except OSError as error:
            self.error = self.error or error
        return len(content)

    def flush(self) -> None:
        """Do nothing: `close` does it."""

    def close(self) -> str:
        """Return the digest.

        Raises:
            OSError: not all could be written.
        """
        self.file.close()
        if self.error:
            raise self.error
        return self.hash.hexdigest()


def write_manifest(folder: Path, written: dict[str, str] | None = None) -> None:
    """Write the size and digest of each file into `manifest.json`, with all of them on the disk before it.

    Args:
        folder: of the files.
        written: the digests of what was to be written, for those whose content is known.

    Raises:
        OSError: one of these has other content.
    """
    manifest = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        give_default_mode(file)
        manifest[str(file.relative_to(folder))] = [file.stat().st_size, digest_of(file)]
        sync(file)
        _forget_content(file)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(inner)
    if wrong := [name for name, digest in (written or {}).items() if manifest[name][1] != digest]:
        raise OSError(0, f"{wrong[0]} reads otherwise than what was written")
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())


def _forget_content(file: Path) -> None:
    # So that reading it back reads the disk, not the kernel's memory of what was written.
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""Which adapters a folder of runs holds, and which of them a name from outside means: nothing else can be read."""

import os
from collections.abc import Iterator
from pathlib import Path

from rasengan import UserError
from rasengan.adapter_places import holds_adapter
from rasengan.adapter_reader import is_peft_folder
from rasengan.adapters import ADAPTABLE, DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE


# Folders below a folder of runs: RUN/checkpoint-N/ema, and one more for those who sort their runs.
DEPTH = 4


def find_adapters(root: Path) -> dict[str, Path]:
    """Return the adapters in a folder, newest first, each a file or a PEFT folder, by the name of its place in it.

    A folder with `pytorch_lora_weights.safetensors` goes by its own name, as `infer.py` takes it. Symbolic links to
    folders are not followed, nor those to files outside; hidden folders are left out, as are folders `DEPTH` deep.

    Args:
        root: a run's output folder, or one with several runs.
    """
    root = root.resolve()
    found = {}
    for folder, paths in _walk(root):
        for path in paths:
            is_run = path.name == DIFFUSERS_FILE and folder != root and folder not in paths
            name = (folder if is_run else path).relative_to(root).as_posix()
            name = f"{root.name}/" if name == "." else name  # the root itself, which no other has for a name
            if name.isprintable():  # others are no text, or of several lines
                found[name] = path
    # What a run saves at once in several layouts is equally old, and stays in this order.
    return dict(sorted(found.items(), key=lambda item: -(_time_of_change(item[1]) // 10)))


def choose_adapter(root: Path, name: object) -> Path:
    """Return the adapter that a name from outside means, which must be one that `find_adapters` gives.

    Raises:
        UserError: it is none; nothing of that name was looked at.
    """
    found = find_adapters(root)
    if not name:
        raise UserError(f"No adapter is chosen. Choose one from the list, which holds {len(found)}.")
    if not isinstance(name, str) or name not in found:
        raise UserError(f"{str(name)[:100]!r} is none of the {len(found)} adapters here. Choose one from the list.")
    return found[name]


def _walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Give each folder, and the adapters that it is or has as files."""
    for name, folders, files in os.walk(root):
        folder = Path(name)
        adapters = [folder] if is_peft_folder(folder) and _stays_inside(folder, root) else []
        if adapters:
            folders[:] = [name for name in folders if name not in ADAPTABLE]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(folder.relative_to(root).parts) == DEPTH:
            folders.clear()
        for file in sorted(folder / name for name in files if name.endswith(".safetensors")):
            stays = file.resolve().is_relative_to(root) and file.is_file()
            # By its name one is an adapter also where it is damaged, which is said when it is chosen.
            if stays and file.name != PEFT_FILE and (file.name == DIFFUSERS_FILE or holds_adapter(file)):
                adapters.append(file)
        yield folder, adapters


def _stays_inside(peft_folder: Path, root: Path) -> bool:
    # All that reading it opens, since a folder in it, or a file, may be a link.
    places = (peft_folder / folder / name for folder in (".", *ADAPTABLE[1:]) for name in (PEFT_CONFIG, PEFT_FILE))
    return all(place.resolve().is_relative_to(root) for place in places)


def _time_of_change(adapter: Path) -> float:
    file = adapter / PEFT_FILE
    file = file if file.is_file() else adapter
    return file.stat().st_mtime if file.exists() else 0.0  # it may just have been removed

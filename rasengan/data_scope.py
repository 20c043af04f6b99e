"""What a data set may name: a stranger's may hold files of its own, and no others of this machine or of the net."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.compute
import yaml

from rasengan import UserError, printable


def check_data_files(
    given: str, name: str, config_name: str | None, data_dir: str | None, cache_dir: str | None
) -> None:
    """Check that a local data set's own settings name no files elsewhere, before anything is read.

    Args:
        given: the flag that named it, with its value.
        name: of the data set; of the hub, nothing is checked.
        config_name: of its configuration.
        data_dir: a folder in it.
        cache_dir: where datasets puts what it reads.

    Raises:
        UserError: they do. Those of the hub are refused by the library.
    """
    if not Path(name).is_dir():
        return
    try:
        outside = list(_urls_in_settings(Path(name)))  # which the library would open to look for files there
    except RecursionError as error:
        raise UserError(
            f"{given}: the settings in its README.md or .huggingface.yaml repeat themselves by YAML aliases, which "
            "may be without end. Write them out."
        ) from error
    if not outside:
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir, data_dir=data_dir)
        files = [path for split in (builder.config.data_files or {}).values() for path in split]
        outside = [path for path in files if not _is_inside(path, _starts([name, data_dir]))]
    if outside:
        raise UserError(
            f"{given} takes its data from {printable(outside[0])}, which is outside of it. A data set may hold only "
            "data of its own: put them there and correct what its README.md or .huggingface.yaml says, or use another "
            "data set."
        )


def check_pictures(
    given: str, dataset: datasets.Dataset, column: str, folders: Iterable[str | None], cache_dir: str | None
) -> None:
    """Check that a data set that was read names no pictures elsewhere, before one is opened.

    Args:
        given: the flag that named it, with its value.
        dataset: pictures undecoded.
        column: of the pictures.
        folders: in which its pictures may lie, beside those of downloads.
        cache_dir: where datasets put what it read.

    Raises:
        UserError: it does.
    """
    if outside := _outside(dataset, column, [*folders, *_downloads(cache_dir)]):
        listed = "".join(f"\n  {printable(path)}" for path in outside[:20]) + "\n  ..." * (len(outside) > 20)
        raise UserError(
            f"{given} names pictures outside of it, {len(outside)} in all. A data set may hold only pictures of its "
            f"own: put them there, or use another data set:{listed}"
        )


def picture_paths(dataset: datasets.Dataset, column: str) -> pyarrow.ChunkedArray:
    """Return the path of each picture, as the data set names it; None where it names none."""
    # From the table: the records hold whole files.
    return pyarrow.compute.struct_field(dataset.data.column(column), "path")


def _urls_in_settings(folder: Path) -> Iterator[str]:
    card, settings = folder / "README.md", folder / datasets.config.REPOYAML_FILENAME
    found = []
    if card.is_file():
        found.append(huggingface_hub.RepoCard.load(card, ignore_metadata_errors=True).data.get("configs"))
    if settings.is_file():
        found.append((yaml.safe_load(settings.read_text(encoding="utf-8")) or {}).get("configs"))
    seen = set()
    while found:
        value = found.pop()
        if isinstance(value, dict | list):
            if id(value) in seen:  # aliases may lead round in a circle, and multiply in the library's hands
                raise RecursionError
            seen.add(id(value))
            found.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str) and ("://" in value or "::" in value):
            yield value


def _downloads(cache_dir: str | None) -> list[str]:
    """Return the folders to which datasets downloads and extracts the files of a data set."""
    if cache_dir:
        own = [os.path.join(cache_dir, datasets.config.DOWNLOADED_DATASETS_DIR)]
    else:
        own = [str(datasets.config.DOWNLOADED_DATASETS_PATH), str(datasets.config.EXTRACTED_DATASETS_PATH)]
    return [huggingface_hub.constants.HF_HUB_CACHE, *own]


def _outside(dataset: datasets.Dataset, column: str, folders: Iterable[str | None]) -> list[str]:
    """Return the paths of pictures that are in none of the folders, by their names alone: a slow disk is not asked."""
    starts = _starts(folders)
    is_elsewhere = pyarrow.compute.struct_field(dataset.data.column(column), "bytes").is_null()
    paths = picture_paths(dataset, column).filter(is_elsewhere).to_pylist()
    return [path for path in paths if path is not None and not _is_inside(path, starts)]


def _starts(folders: Iterable[str | None]) -> tuple[str, ...]:
    places = [place(os.path.expanduser(f)) for f in folders if f for place in (os.path.abspath, os.path.realpath)]
    return tuple(os.path.join(place, "") for place in places)


def _is_inside(path: str, starts: tuple[str, ...]) -> bool:
    # Only the name is looked at, so links are followed. Of "zip://inner::archive" the place is the archive's.
    inner, is_packed, place = path.partition("::") if re.match(r"(zip|tar)://", path) else ("", "", path)
    return "://" not in place and os.path.abspath(place).startswith(starts)

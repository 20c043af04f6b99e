"""Captioned pictures: find them and their captions."""

import errno
import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import numpy as np
from tqdm.auto import tqdm

from rasengan import UserError, captions, data_scope, first_line, metadata, printable
from rasengan.imaging import Picture, inspect_pictures, is_picture_name


logger = logging.getLogger(__name__)

ARCHIVES = {".zip", ".tar", ".tgz", ".gz"}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


# --- finding pictures and captions ---


def check_settings(dataset_name: str | None, train_data_dir: str | None, resolution: int, bucket_step_px: int) -> None:
    """Check what is said of the data, before anything is read.

    Raises:
        UserError: there is no data, or a size does not fit the VAE.
    """
    if dataset_name is None and train_data_dir is None:
        raise UserError("There is no data: give --dataset_name, or --train_data_dir with captions.")
    for flag, value in (("--resolution", resolution), ("--bucket_step_px", bucket_step_px)):
        if value % 8:
            raise UserError(f"{flag} is {value}. Give a multiple of 8, such as {value // 8 * 8}.")


def is_library_cache(place: object) -> bool:
    """Say whether a place, as a stranger's file may name it, is a folder that holds downloads or read data sets."""
    names = ("models--", "datasets--", "downloads", "metadata-")
    return isinstance(place, str) and os.path.isdir(place) and any(n.startswith(names) for n in os.listdir(place))


def check_outside(settings: Mapping[str, object]) -> None:
    """Check that what is written does not lie among the data; the settings are by the names of their flags.

    A data set of the hub has no folder; a local copy of one is read with all that lies in it.

    Raises:
        UserError: it does.
    """
    directories = {name: settings.get(name) for name in ("train_data_dir", "dataset_name")}
    for flag in ("output_dir", "conditioning_cache_dir", "cache_dir", "logging_dir"):
        place = settings.get(flag)
        for name, directory in directories.items():
            is_folder = bool(directory) and Path(directory).is_dir()
            if place and is_folder and Path(place).resolve().is_relative_to(Path(directory).resolve()):
                raise UserError(
                    f"--{flag} {place} lies in --{name} {directory}: what is written there would be among what to "
                    "train on when the folder is read again. Give one outside of it."
                )


def find_pictures(
    settings: Mapping[str, object], make_bar: Callable[[str, int], tqdm]
) -> tuple[datasets.Dataset, datasets.Dataset, list[Picture]]:
    """Return the whole data set, the rows that are drawn of it, and what is known of the picture of each.

    Args:
        settings: by the names of their flags.
        make_bar: called with what a progress bar is of, and with how many.

    Raises:
        UserError: as `load_pictures`. A picture that cannot be used is none: what is known of it says why.
    """
    names = ("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "cache_dir")
    whole = load_pictures(*(settings[name] for name in names))
    drawn, positions = draw_samples(whole, settings["max_train_samples"], settings["seed"])
    column, memory_dir = drawn[settings["image_column"]], Path(settings["conditioning_cache_dir"])
    with make_bar("Checking pictures", len(drawn)) as bar:
        return whole, drawn, inspect_pictures(column, memory_dir, bar.update, positions)


def load_pictures(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    image_column: str,
    caption_column: str,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Return the train split of a hub dataset, a local copy of one, or a folder; pictures stay undecoded.

    A folder's captions stand in its metadata, as imagefolders have it, or beside each picture in a .txt of its name.
    A picture without one has a row too: `captions.read_captions` tells of it.

    Raises:
        UserError: there is nothing there, or a column is missing.
    """
    given = f"--dataset_name {dataset_name}" if dataset_name else f"--train_data_dir {train_data_dir}"
    if dataset_name is None and not Path(train_data_dir).is_dir():
        raise UserError(f"{given} is no folder. Give one that holds pictures and captions.")
    files = list_files(train_data_dir) if dataset_name is None else []
    count = sum(map(is_picture_name, files))
    none_there = UserError(f"{given} holds no pictures. Put some there, with captions.")
    if odd := [file for file in files if not _is_utf8(file)]:
        raise UserError(
            f"{len(odd)} names of files in {ascii(given)[1:-1]} are not UTF-8, such as {ascii(odd[0].name)}. Rename "
            "them, and the folder if its own name is not."
        )
    packed = {file for file in files if file.suffix.lower() in ARCHIVES}
    if dataset_name is None and not count:
        if packed:
            raise UserError(
                f"{given} holds no pictures but in archives such as {min(packed).name}. Unpack them there."
            )
        if unknown := captions.unknown_files(files):
            raise UserError(
                f"{given} holds no pictures of a known format, but {len(unknown)} other files: {_few(unknown)}. "
                "Convert them to JPEG or PNG."
            )
        raise none_there
    used_cache, beside = cache_dir, None
    try:
        if dataset_name is not None:
            data_scope.check_data_files(given, dataset_name, dataset_config_name, train_data_dir, cache_dir)
            found = datasets.load_dataset(
                dataset_name, dataset_config_name, cache_dir=cache_dir, data_dir=train_data_dir
            )
        elif beside := captions.find_beside(files):
            columns = datasets.Dataset.from_dict(captions.read_beside(beside))
            found = {"train": columns.cast_column("image", datasets.Image(decode=False))}
        else:
            # Archives, which datasets looks into, may hold the pictures that lie beside them.
            loose = [glob.escape(str(file)) for file in files if file not in packed] if packed else None
            patterns = {"train": loose or f"{glob.escape(train_data_dir)}/**"}
            used_cache = _folder_cache(train_data_dir, files, cache_dir)
            found = datasets.load_dataset("imagefolder", data_files=patterns, cache_dir=used_cache)
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated classes for what is a wrong name or a broken file
        raise _unreadable(error, given, files, cache_dir) from error
    if "train" not in found:
        raise UserError(f"{given} has no split 'train', but {', '.join(found)}. Rename one of them.")
    dataset = found["train"]
    _check_columns(dataset, given, image_column, caption_column)
    if len(dataset) == 0:
        raise none_there
    data_scope.check_pictures(given, dataset, image_column, [dataset_name, train_data_dir], used_cache)
    if dataset_name is None:
        _warn_of_odd_files(given, files, data_scope.picture_paths(dataset, image_column).to_pylist(), beside)
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def _unreadable(error: Exception, given: str, files: list[Path], cache_dir: str | None) -> UserError:
    """Return what to tell of an error of datasets: its cache cannot be written, or what it read is wrong."""
    cause = error.__cause__ or error
    where = cache_dir or datasets.config.HF_DATASETS_CACHE
    is_there = isinstance(cause, OSError) and Path(str(cause.filename or "/")).is_relative_to(os.path.abspath(where))
    if isinstance(cause, OSError) and (cause.errno in NO_ROOM or (is_there and cause.errno in NOT_WRITABLE)):
        return UserError(f"{where} cannot be written: {cause.strerror}. Make room, or give another --cache_dir.")
    reason = (metadata.find_fault(files) or first_line(cause)).rstrip(".")
    return UserError(f"{given} cannot be read: {reason}. Correct the name, or what it holds.")


def _check_columns(dataset: datasets.Dataset, given: str, image_column: str, caption_column: str) -> None:
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            there = ", ".join(map(_shown, dataset.column_names))
            raise UserError(
                f"{flag} {column} is no column of {given}; its columns are: {there}. "
                "In a folder, captions stand in a metadata.jsonl with the keys file_name and text, or in a .txt "
                "beside each picture."
            )
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise UserError(
            f"--image_column {image_column} of {given} holds {dataset.features[image_column]}, not pictures. "
            "Give the column that does."
        )


def _shown(column: str) -> str:
    return column if column == column.strip() else repr(column)


def _warn_of_odd_files(given: str, files: list[Path], paths: list[str | None], beside: captions.Beside | None) -> None:
    lines, file_count = Counter(paths), sum(map(is_picture_name, files))
    if hidden := len(captions.hidden_by_metadata(files)):
        logger.warning(
            "%d .txt beside pictures of %s are not read, since its metadata has the captions", hidden, given
        )
    if file_count > len(lines):
        logger.warning(
            "%d pictures of %s have no line in its metadata, and are left out", file_count - len(lines), given
        )
    if twice := [Path(path) for path, count in lines.items() if path and count > 1]:
        logger.warning("%d pictures of %s have several lines, and count as often: %s", len(twice), given, _few(twice))
    if beside and beside.strays:
        strays = _few(beside.strays)
        logger.warning("%d .txt of %s stand beside no picture of their name: %s", len(beside.strays), given, strays)
    named = {os.path.abspath(path) for path in paths if path}
    if unknown := [file for file in captions.unknown_files(files) if os.path.abspath(file) not in named]:
        logger.warning(
            "%d files of %s are no pictures of a known format, and are left out: %s. Convert them to JPEG or PNG",
            *(len(unknown), given, _few(unknown)),
        )


def list_files(directory: str) -> list[Path]:
    """Return the files in a folder and in the folders below it, but for hidden ones and those in hidden folders.

    A link that leads nowhere counts as a file: what it named is missing, and should be told of.
    """
    paths = [
        path for path in Path(directory).rglob("*") if path.is_file() or (path.is_symlink() and not path.exists())
    ]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(directory).parts)]


def _few(files: list[Path]) -> str:
    return printable(", ".join(file.name for file in files[:10]) + ", ..." * (len(files) > 10))


def _is_utf8(file: Path) -> bool:
    try:
        return bool(str(file).encode())
    except UnicodeEncodeError:  # of bytes that Python could not decode, as archives of other systems leave them
        return False


def _folder_cache(directory: str, files: list[Path], cache_dir: str | None) -> str:
    # datasets knows a file by its path and time of change; a caption may change and the time come back.
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in files if path.name in metadata.FILE_NAMES):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(directory)} {len(content)} ".encode() + content)
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"metadata-{digest.hexdigest()}")


def draw_samples(dataset: datasets.Dataset, count: int | None, seed: int) -> tuple[datasets.Dataset, list[int]]:
    """Return so many rows, drawn by the seed as `Dataset.shuffle` draws, and where they were; None leaves all."""
    if count is None:
        return dataset, list(range(len(dataset)))
    order = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()
    return dataset.select(order), order


# --- which pictures are used ---


def leave_out_broken(
    dataset: datasets.Dataset, pictures: list[Picture], skip: bool
) -> tuple[datasets.Dataset, list[Picture]]:
    """Return the rows and pictures that can be used, and warn of the others if they are to be skipped.

    Raises:
        UserError: some cannot be used and are not to be skipped, or none can be used.
    """
    bad = [picture for picture in pictures if picture.error]
    if bad and not skip:
        listed = "".join(f"\n  {printable(f'{picture.name} {picture.error}')}" for picture in bad)
        raise UserError(
            f"{len(bad)} of {len(pictures)} pictures cannot be used. Mend or remove them, or leave them out with "
            f"--skip_bad_images:{listed}"
        )
    if not bad:
        return dataset, pictures
    names = _few([Path(picture.name) for picture in bad])
    logger.warning("--skip_bad_images leaves out %d of %d pictures: %s", len(bad), len(pictures), names)
    good = [row for row, picture in enumerate(pictures) if not picture.error]
    if not good:
        raise UserError("Not one picture can be used. Give others.")
    return dataset.select(good), [pictures[row] for row in good]


def data_digest(pictures: list[Picture], captions: list[list[str]]) -> str:
    """Return a digest of what the samples are drawn from: the pictures' contents and captions, in order."""
    content = json.dumps([[picture.digest for picture in pictures], captions])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

"""Captioned pictures: find them and their captions."""

import errno
import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import pyarrow.compute
from PIL import Image

from rasengan import UserError, first_line
from rasengan.imaging import PROGRAM, Picture


logger = logging.getLogger(__name__)

ARCHIVES = {".zip", ".tar", ".tgz", ".gz"}
METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # what datasets takes for it
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


class LongCaption(NamedTuple):
    """A caption of which the text encoders see only the beginning."""

    name: str  # of its picture
    token_count: int
    seen: str  # as the tokenizer reads it
    unseen: str


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
    packed = any(file.suffix.lower() in ARCHIVES for file in files)  # which datasets looks into
    if dataset_name is None and not (count or packed):
        raise none_there
    used_cache = cache_dir
    try:
        if dataset_name is not None:
            found = datasets.load_dataset(
                dataset_name, dataset_config_name, cache_dir=cache_dir, data_dir=train_data_dir
            )
        elif beside := _captions_beside(files):
            found = {"train": datasets.Dataset.from_dict(beside).cast_column("image", datasets.Image(decode=False))}
        else:
            patterns = {"train": f"{glob.escape(train_data_dir)}/**"}
            used_cache = _folder_cache(train_data_dir, files, cache_dir)
            found = datasets.load_dataset("imagefolder", data_files=patterns, cache_dir=used_cache)
    except UserError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated classes for what is a wrong name or a broken file
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            where = cache_dir or datasets.config.HF_DATASETS_CACHE
            raise UserError(
                f"{where} cannot be written: {cause.strerror}. Make room, or give another --cache_dir."
            ) from error
        reason = first_line(cause)
        raise UserError(f"{given} cannot be read: {reason} Correct the name, or what it holds.") from error
    if "train" not in found:
        raise UserError(f"{given} has no split 'train', but {', '.join(found)}. Rename one of them.")
    dataset = found["train"]
    if count > len(dataset):
        logger.warning("%d pictures of %s have no line in its metadata, and are left out", count - len(dataset), given)
    for flag, column in (("--image_column", image_column), ("--caption_column", caption_column)):
        if column not in dataset.column_names:
            raise UserError(
                f"{flag} {column} is no column of {given}; its columns are: {', '.join(dataset.column_names)}. "
                "In a folder, captions stand in a metadata.jsonl with the keys file_name and text, or in a .txt "
                "beside each picture."
            )
    if not isinstance(dataset.features[image_column], datasets.Image):
        raise UserError(
            f"--image_column {image_column} of {given} holds {dataset.features[image_column]}, not pictures. "
            "Give the column that does."
        )
    if len(dataset) == 0:
        raise none_there
    if outside := _first_outside(dataset, image_column, [dataset_name, train_data_dir, *_downloads(used_cache)]):
        raise UserError(
            f"{given} names the picture {outside}, which is outside of it. A data set may hold only pictures of its "
            "own: put the picture there, or use another data set."
        )
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def _downloads(cache_dir: str | None) -> list[str]:
    """Return the folders to which datasets downloads and extracts the files of a data set."""
    if cache_dir:
        own = [os.path.join(cache_dir, datasets.config.DOWNLOADED_DATASETS_DIR)]
    else:
        own = [str(datasets.config.DOWNLOADED_DATASETS_PATH), str(datasets.config.EXTRACTED_DATASETS_PATH)]
    return [huggingface_hub.constants.HF_HUB_CACHE, *own]


def _first_outside(dataset: datasets.Dataset, column: str, folders: Iterable[str | None]) -> str | None:
    """Return the first path of a picture that is in none of the folders; None if there is no such.

    Only the names are looked at, so links are followed, and a slow disk is not asked for thousands of files.
    """
    places = [place(os.path.expanduser(f)) for f in folders if f for place in (os.path.abspath, os.path.realpath)]
    starts = tuple(os.path.join(place, "") for place in places)
    # From the table: the records hold whole files.
    pictures = dataset.data.column(column)
    is_elsewhere = pyarrow.compute.struct_field(pictures, "bytes").is_null()
    for path in pyarrow.compute.struct_field(pictures, "path").filter(is_elsewhere).to_pylist():
        # Of "zip://inner::archive" that is the archive.
        if path is not None and not os.path.abspath(path.rpartition("::")[2]).startswith(starts):
            return path
    return None


def _captions_beside(files: list[Path]) -> dict[str, list[str]] | None:
    """Return pictures and the captions that stand beside each in a .txt; None where there is metadata, or no such."""
    texts = {file.with_suffix("") for file in files if file.suffix == ".txt"}
    pictures = sorted(file for file in files if is_picture_name(file))
    without = [file for file in pictures if file.with_suffix("") not in texts]
    if any(file.name in METADATA for file in files) or len(without) == len(pictures):
        return None
    if without:
        names = ", ".join(file.name for file in without[:10]) + ", ..." * (len(without) > 10)
        raise UserError(
            f"{len(without)} of {len(pictures)} pictures have no .txt of their name with a caption: {names}. Write "
            "one for each, empty where it needs none, or move these pictures elsewhere."
        )
    captions = []
    for file in pictures:
        try:
            captions.append(" ".join(file.with_suffix(".txt").read_text(encoding="utf-8-sig").split()))
        except UnicodeDecodeError as error:
            raise UserError(f"{file.with_suffix('.txt')} is no text in UTF-8. Save it as such.") from error
    return {"image": [str(file) for file in pictures], "text": captions}


def list_files(directory: str) -> list[Path]:
    """Return the files in a folder and in the folders below it, but for hidden ones and those in hidden folders."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(directory).parts)]


def _is_utf8(file: Path) -> bool:
    try:
        return bool(str(file).encode())
    except UnicodeEncodeError:  # of bytes that Python could not decode, as archives of other systems leave them
        return False


def is_picture_name(file: Path) -> bool:
    """Say whether a file's name ends as those of pictures that can be read."""
    return Image.registered_extensions().get(file.suffix.lower()) in Image.OPEN.keys() - {PROGRAM}


def _folder_cache(directory: str, files: list[Path], cache_dir: str | None) -> str:
    # datasets knows a file by its path and time of change; a caption may change and the time come back.
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in files if path.name in METADATA):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(directory)} {len(content)} ".encode() + content)
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"metadata-{digest.hexdigest()}")


def draw_samples(dataset: datasets.Dataset, count: int | None, seed: int) -> tuple[datasets.Dataset, list[int]]:
    """Return so many rows, drawn by the seed as `Dataset.shuffle` draws, and where they were; None leaves all."""
    if count is None:
        return dataset, list(range(len(dataset)))
    order = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()
    return dataset.select(order), order


def read_captions(column: list, pictures: list[Picture] | None = None) -> list[list[str]]:
    """Return every picture's captions, one or several.

    Args:
        column: of the captions.
        pictures: of the same rows, for the error.

    Raises:
        UserError: one is neither a text nor a list of texts.
    """
    captions = []
    for position, value in enumerate(column):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            name = f"{pictures[position].position} ({pictures[position].name})" if pictures else position
            raise UserError(
                f"Picture {name} has {value!r} in the caption column, neither a text nor a list of texts. "
                "Correct its line in the metadata, or give another --caption_column."
            )
        captions.append(texts)
    return captions


def warn_of_long_captions(captions: list[list[str]], pictures: list[Picture], tokenizer) -> int:
    """Say how many captions are longer than the text encoders see, or empty; return how many are longer.

    Args:
        captions: of each picture.
        pictures: likewise, for the names.
        tokenizer: the first; SDXL's two split a text alike.
    """
    texts = [(text, picture.name) for several, picture in zip(captions, pictures, strict=True) for text in several]
    found = find_long_captions(captions, pictures, tokenizer)
    if blank := [Path(name).name for text, name in texts if not text.strip()]:
        logger.warning("%d of %d captions are empty, such as that of %s", len(blank), len(texts), blank[0])
    if found:
        longest = ", ".join(
            f"{Path(one.name).name} ({one.token_count} tokens, unseen: {_shortened(one.unseen)!r})"
            for one in found[:3]
        )
        logger.warning(
            "%d of %d captions are longer than the %d tokens that the text encoders see: %s",
            *(len(found), len(texts), tokenizer.model_max_length, longest),
        )
    return len(found)


def find_long_captions(captions: list[list[str]], pictures: list[Picture], tokenizer) -> list[LongCaption]:
    """Return the captions that are longer than the text encoders see, the longest first.

    Args:
        captions: of each picture.
        pictures: likewise, for the names.
        tokenizer: the first; SDXL's two split a text alike.
    """
    names = [picture.name for several, picture in zip(captions, pictures, strict=True) for _ in several]
    limit, found = tokenizer.model_max_length, []
    tokenized = tokenizer([text for several in captions for text in several], verbose=False)["input_ids"]
    for name, tokens in zip(names, tokenized, strict=True):
        if len(tokens) > limit:
            # Without its begin and end, and with their room for them.
            seen, unseen = (tokenizer.decode(part).strip() for part in (tokens[1 : limit - 1], tokens[limit - 1 : -1]))
            found.append(LongCaption(name, len(tokens), seen, unseen))
    return sorted(found, key=lambda one: one.token_count, reverse=True)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


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
        listed = "".join(f"\n  {picture.name} {picture.error}" for picture in bad)
        raise UserError(
            f"{len(bad)} of {len(pictures)} pictures cannot be used. Mend or remove them, or leave them out with "
            f"--skip_bad_images:{listed}"
        )
    if not bad:
        return dataset, pictures
    names = ", ".join(Path(picture.name).name for picture in bad[:10]) + ", ..." * (len(bad) > 10)
    logger.warning("--skip_bad_images leaves out %d of %d pictures: %s", len(bad), len(pictures), names)
    good = [row for row, picture in enumerate(pictures) if not picture.error]
    if not good:
        raise UserError("Not one picture can be used. Give others.")
    return dataset.select(good), [pictures[row] for row in good]


def data_digest(pictures: list[Picture], captions: list[list[str]]) -> str:
    """Return a digest of what the samples are drawn from: the pictures' contents and captions, in order."""
    content = json.dumps([[picture.digest for picture in pictures], captions])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

"""Captions: beside their pictures or in metadata, what is wrong with some, and what the encoders see of long ones."""

import csv
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet

from rasengan import UserError, first_line, printable
from rasengan.imaging import Picture, is_picture_name


logger = logging.getLogger(__name__)

METADATA = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # what datasets takes for it
# Of files that stand beside pictures in many data sets, and are none.
COMPANIONS = {".txt", ".caption", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml"}
COMPANIONS |= {".toml", ".ini", ".db", ".log", ".lock", ".npz", ".npy", ".pt", ".safetensors", ".py", ".html", ".xml"}
COMPANIONS |= {".pdf", ".zip", ".tar", ".tgz", ".gz"}
COMPANION_NAMES = {"readme", "license", "licence", "copying", "notice"}
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
_KINDS |= {bool: "true or false", type(None): "null"}
FAULTS = "__caption_fault__"  # a column that says why a picture has no caption, only where one has none


class LongCaption(NamedTuple):
    """A caption of which the text encoders see only the beginning."""

    name: str  # of its picture
    token_count: int
    seen: str  # as the tokenizer reads it
    unseen: str


# --- beside the pictures ---


class Beside(NamedTuple):
    """The files of a folder whose captions stand beside the pictures, each in a .txt of its picture's name."""

    pictures: list[Path]
    texts: list[Path]  # of these pictures
    strays: list[Path]  # the .txt of no picture, and of no file that may be one of an unknown format


def find_beside(files: list[Path]) -> Beside | None:
    """Return which of a folder's files are pictures and captions; None where it has metadata, or no such captions."""
    pictures = sorted(filter(is_picture_name, files))
    names = {picture.with_suffix("") for picture in pictures}
    all_texts = sorted(file for file in files if file.suffix.lower() == ".txt")
    texts = [file for file in all_texts if file.with_suffix("") in names]
    if not texts or any(file.name in METADATA for file in files):
        return None
    names |= {file.with_suffix("") for file in unknown_files(files)}
    return Beside(pictures, texts, [file for file in all_texts if file.with_suffix("") not in names])


def unknown_files(files: list[Path]) -> list[Path]:
    """Return which of a folder's files are neither pictures that can be read nor what stands beside them."""
    others = (file for file in files if not is_picture_name(file) and file.suffix.lower() not in COMPANIONS)
    return sorted(file for file in others if file.name.lower() not in COMPANION_NAMES)


def hidden_by_metadata(files: list[Path]) -> list[Path]:
    """Return the .txt that stand beside pictures and are not read, since the folder has metadata."""
    found = find_beside([file for file in files if file.name not in METADATA])
    return found.texts if found and find_beside(files) is None else []


def read_beside(found: Beside) -> dict[str, list[str | None]]:
    """Return the columns "image", of paths, and "text", and `FAULTS` if a picture has no caption that can be read."""
    columns, texts = {"image": [], "text": [], FAULTS: []}, {text.with_suffix(""): text for text in found.texts}
    for picture in found.pictures:
        file, caption, fault = texts.get(picture.with_suffix("")), None, None
        try:
            if file is not None:
                caption = " ".join(file.read_text(encoding="utf-8-sig").split())
            else:
                file = picture.with_suffix(".txt")
                fault = (
                    f"has no {file.name} beside it" + ", but something of that name that is no file" * file.exists()
                )
        except UnicodeDecodeError:
            fault = f"has a caption that is no text in UTF-8, in {file.name}"
        except OSError as error:
            fault = f"has a caption that cannot be read, in {file.name}: {error.strerror}"
        for name, value in zip(columns, (str(picture), caption, fault), strict=True):
            columns[name].append(value)
    return columns if any(columns[FAULTS]) else {name: columns[name] for name in ("image", "text")}


# --- in metadata ---


def metadata_fault(files: Iterable[Path]) -> str | None:
    """Say in which file and line metadata are not what the datasets library reads; None if nothing is seen here.

    Args:
        files: of the folder, those of other names too.
    """
    for file in sorted(file for file in files if file.name in METADATA):
        if file.suffix == ".parquet":
            if fault := _fault_of_parquet(file):
                return f"{file} {fault}"
            continue
        try:
            content = file.read_bytes()
        except OSError as error:
            return f"{file}: {error.strerror}."
        try:
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            number = content.count(b"\n", 0, error.start) + 1
            return f"{file}, line {number}: this is no text in UTF-8. Save the file as such."
        if not any(line.strip() for line in lines):
            example = json.dumps({"file_name": "one.png", "text": "a caption"})
            return f"{file} is empty. Write a line for each picture, such as {example}."
        fault = _fault_of_csv(lines) if file.suffix == ".csv" else _fault_of_jsonl(lines)
        if fault:
            return f"{file}, {printable(fault)}."
    return None


def _fault_of_parquet(file: Path) -> str | None:
    try:
        rows = pyarrow.parquet.read_metadata(file).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        return f"is no parquet file: {first_line(error)}"
    return None if rows else "has no rows. Write one for each picture."


def _fault_of_csv(lines: list[str]) -> str | None:
    first = next(number for number, line in enumerate(lines, 1) if line.strip())
    rows = csv.reader(lines[first - 1 :])
    try:
        columns = next(rows)
    except csv.Error as error:
        return f"line {first}: {error}"
    if not any(map(_names_pictures, columns)):
        return f"line {first}: no column is file_name, but {', '.join(columns)}"
    has_rows = False
    try:
        for row in filter(None, rows):
            has_rows = True
            if len(row) > len(columns):
                return (
                    f"line {first - 1 + rows.line_num}: there are {len(row)} values for {len(columns)} columns. Put "
                    'those with commas in quotes: "a, b"'
                )
    except csv.Error:  # of a field that is too long for this reader alone
        return None
    return None if has_rows else f"line {first}: the columns' names are there, and no line for a picture below"


def _names_pictures(column: str) -> bool:
    return column in {"file_name", "file_names"} or column.endswith(("_file_name", "_file_names"))


def _fault_of_jsonl(lines: list[str]) -> str | None:
    seen = {}  # of each key what kind of value it has, and where
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_twins)
            json.dumps(row, ensure_ascii=False).encode()
        except _Twice as error:
            return f"line {number}: {error} stands there twice"
        except UnicodeEncodeError as error:
            return f"line {number}: {ascii(error.object[error.start])} is half a character"
        except json.JSONDecodeError as error:
            return f"line {number}: this is no JSON: {error.msg} at character {error.pos + 1}"
        except (RecursionError, ValueError) as error:  # brackets in brackets, or a number of thousands of digits
            return f"line {number}: this cannot be read: {first_line(error)}"
        if not isinstance(row, dict):
            return f"line {number}: this is {_KINDS[type(row)]}, not an object in braces"
        if not any(map(_names_pictures, row)):
            return f"line {number}: there is no file_name"
        if "file_name" in row and not isinstance(row["file_name"], str):
            return f"line {number}: file_name is {_KINDS[type(row['file_name'])]}, not the name of a file in quotes"
        if any("::" in str(value) for key, value in row.items() if _names_pictures(key)):
            return f"line {number}: a file's name holds ::, which marks a file in an archive. Rename it"
        for key, value in row.items():
            if isinstance(value, list) and len(set(map(type, value)) - {type(None)}) > 1:
                return f"line {number}: {key} is a list of values of different kinds"
            first_kind, first = seen.setdefault(key, (type(value), number)) if value is not None else (None, None)
            if first_kind not in (None, type(value)) and {first_kind, type(value)} != {int, float}:
                return f"line {number}: {key} is {_KINDS[type(value)]}, and {_KINDS[first_kind]} in line {first}"
    return None


class _Twice(Exception):
    """A key that an object has twice."""


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    row = {}
    for key, value in pairs:
        if key in row:
            raise _Twice(key)
        row[key] = value
    return row


# --- what is read ---


def texts_of(value: str | list[str]) -> list[str]:
    """Return what stands in a caption column as a list, one text or several."""
    return [value] if isinstance(value, str) else value


def fault_of(value) -> str | None:
    """Say what is wrong with what stands in a caption column; None where it is a text or a list of texts."""
    texts = texts_of(value)
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return None
    if value is None:
        return "has no caption (of CSV, an empty one counts as none, and so do NA, null and None: use metadata.jsonl)"
    return f"has {value!r} in the caption column, neither a text nor a list of texts"


def faults(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """Return of each row what is wrong with its caption, in words that follow the picture's name, or None."""
    known = dataset[FAULTS][:] if FAULTS in dataset.column_names else [None] * len(dataset)
    return [why or fault_of(value) for why, value in zip(known, dataset[column][:], strict=True)]


def read_captions(dataset: datasets.Dataset, column: str, pictures: list[Picture]) -> list[list[str]]:
    """Return every picture's captions, one or several.

    Args:
        dataset: with a column of texts or lists of texts.
        column: its name.
        pictures: of the same rows, for the error.

    Raises:
        UserError: some are neither; they are listed.
    """
    found = zip(pictures, faults(dataset, column), strict=True)
    bad = [f"picture {picture.position}, {picture.name}, {fault}" for picture, fault in found if fault]
    if bad:
        listed = "".join(f"\n  {printable(line)}" for line in bad)
        raise UserError(
            f"{len(bad)} of {len(pictures)} captions cannot be used. Write or correct them (a .txt may be empty), "
            f"or give another --caption_column:{listed}"
        )
    return [texts_of(value) for value in dataset[column][:]]


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
        logger.warning("%d of %d captions are empty, such as that of %s", len(blank), len(texts), printable(blank[0]))
    if found:
        longest = ", ".join(
            f"{printable(Path(one.name).name)} ({one.token_count} tokens, unseen: {_shortened(one.unseen)!r})"
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
            seen, unseen = _whole_characters(tokens[1:-1], limit - 2, tokenizer)
            found.append(LongCaption(name, len(tokens), seen, unseen))
    return sorted(found, key=lambda one: one.token_count, reverse=True)


def _whole_characters(tokens: list[int], limit: int, tokenizer) -> tuple[str, str]:
    """Return the texts of the first `limit` tokens and of the rest; a character that is cut belongs to the rest."""
    marks = tokenizer.decode(tokens).count("\ufffd")  # which the caption itself may hold
    for place in range(limit, limit - 4, -1):  # a character has four bytes at most, each of which may be a token
        seen, unseen = (tokenizer.decode(part).strip() for part in (tokens[:place], tokens[place:]))
        if (seen + unseen).count("\ufffd") == marks:
            break
    return seen, unseen


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Captions: those beside their pictures, what is wrong with some, and what the encoders see of long ones."""

import logging
from pathlib import Path
from typing import NamedTuple

import datasets

from rasengan import UserError, metadata, printable
from rasengan.imaging import Picture, is_picture_name


logger = logging.getLogger(__name__)

# Of files that stand beside pictures in many data sets, and are none.
COMPANIONS = {".txt", ".caption", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml"}
COMPANIONS |= {".toml", ".ini", ".db", ".log", ".lock", ".npz", ".npy", ".pt", ".safetensors", ".py", ".html", ".xml"}
COMPANIONS |= {".pdf", ".zip", ".tar", ".tgz", ".gz"}
COMPANION_NAMES = {"readme", "license", "licence", "copying", "notice"}
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
    if not texts or any(file.name in metadata.FILE_NAMES for file in files):
        return None
    names |= {file.with_suffix("") for file in unknown_files(files)}
    return Beside(pictures, texts, [file for file in all_texts if file.with_suffix("") not in names])


def unknown_files(files: list[Path]) -> list[Path]:
    """Return which of a folder's files are neither pictures that can be read nor what stands beside them."""
    others = (file for file in files if not is_picture_name(file) and file.suffix.lower() not in COMPANIONS)
    return sorted(file for file in others if file.name.lower() not in COMPANION_NAMES)


def hidden_by_metadata(files: list[Path]) -> list[Path]:
    """Return the .txt that stand beside pictures and are not read, since the folder has metadata."""
    found = find_beside([file for file in files if file.name not in metadata.FILE_NAMES])
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

"""What there is to know of a data set before training: its numbers, and what should be mended, with the remedy."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rasengan import data_statistics, printable
from rasengan.captions import LongCaption
from rasengan.data_statistics import crop_loss, crop_named, enlargement, find_wordy, most_first, size_of
from rasengan.data_survey import Look, Usable
from rasengan.imaging import Picture, Size
from rasengan.near_duplicates import similar_groups


class Finding(NamedTuple):
    """What should be looked at, and what to do about it."""

    count: int
    text: str
    advice: str
    examples: list[str]


class Report(NamedTuple):
    """What is said of a data set."""

    tables: dict[str, dict[str, str]]
    histograms: dict[str, dict[str, int]]
    findings: list[Finding]
    refusal: str  # training's words where it would not start, else empty


def make_report(
    pictures: list[Picture],
    usable: Usable,
    looks: list[Look],
    unlisted: list[str],
    unread: list[str],
    long_captions: list[LongCaption] | None,
    *,
    unknown: list[str],
    directory: str | None,
    sizes: list[Size],
    center_crop: bool,
    refused: str,
) -> Report:
    """Return the numbers and the findings.

    Args:
        pictures: all, the broken ones included.
        usable: of those.
        looks: at the usable ones.
        unlisted: files that no metadata names.
        unread: .txt whose captions do not count.
        long_captions: of the usable ones; None where tokens could not be counted.
        unknown: files of no known format.
        directory: what names are shortened by; None leaves them.
        sizes: `imaging.crop_sizes`.
        center_crop: the crops are at the center, and not at random.
        refused: what `refusal` returned.
    """
    name = partial(short_name, directory=directory)
    named = [(text, name(p.name)) for p, texts in zip(usable.pictures, usable.captions, strict=True) for text in texts]
    shown = [picture._replace(name=name(picture.name)) for picture in usable.pictures]
    found = [
        *_unusable_findings(pictures, usable, unlisted, unread, unknown, name),
        *_size_findings(shown, sizes, center_crop),
        *_copy_findings(shown, looks),
        *_caption_findings(named, long_captions, name),
    ]
    tables = data_statistics.tables(pictures, shown, looks, usable.captions, long_captions, sizes)
    histograms = data_statistics.histograms(shown, usable.captions)
    return Report(tables, histograms, [finding for finding in found if finding.count], refused)


def short_name(name: str, directory: str | None) -> str:
    """Return a picture's name inside its folder, with what a terminal would act on escaped."""
    if directory is not None and Path(os.path.abspath(name)).is_relative_to(os.path.abspath(directory)):
        name = os.path.relpath(name, directory)
    return printable(name)


def quoted(text: str, most: int = 80) -> str:
    """Return the text in quotes, on one line and shortened."""
    return f'"{printable(text if len(text) <= most else f"{text[: most - 3]}...")}"'


# --- findings ---


def _unusable_findings(
    pictures,
    usable: Usable,
    unlisted: list[str],
    unread: list[str],
    unknown: list[str],
    name: Callable[[str], str],
) -> list[Finding]:
    bad = [picture for picture in pictures if picture.error]
    missing = [picture for picture in bad if _is_missing(picture)]
    broken = [picture for picture in bad if not _is_missing(picture)]
    total = f"of {len(pictures):,}"
    return [
        Finding(
            len(broken),
            f"{total} pictures are broken",
            "Mend them, or remove them and their lines; --skip_bad_images leaves them out.",
            [f"{name(picture.name)} {printable(picture.error)}" for picture in broken],
        ),
        Finding(
            len(missing),
            f"{total} lines of the metadata name a picture that is not there",
            "Correct the file_name, or remove the line; --skip_bad_images leaves them out.",
            [name(picture.name) for picture in missing],
        ),
        Finding(
            len(usable.bad_captions),
            f"{total} captions cannot be used",
            "Write or correct them (a .txt may be empty), or give another --caption_column.",
            [f"{name(picture)} {printable(fault)}" for picture, fault in usable.bad_captions],
        ),
        Finding(
            len(unlisted),
            f"picture file{'s' * (len(unlisted) != 1)} without a line in the metadata",
            "Left out. Write a line for each, or move them elsewhere.",
            [name(file) for file in unlisted],
        ),
        Finding(
            len(unread),
            "of the .txt are not read",
            "One counts if it has its picture's name and there is no metadata. Rename it, or move it elsewhere.",
            [name(file) for file in unread],
        ),
        Finding(
            len(unknown),
            "file is no picture of a known format" if len(unknown) == 1 else "files are no pictures of a known format",
            "Left out. Convert them to JPEG or PNG, or move them elsewhere.",
            [name(file) for file in unknown],
        ),
    ]


def _is_missing(picture: Picture) -> bool:
    return picture.error == "is missing" or not (picture.digest or os.path.lexists(picture.name))


def _size_findings(pictures: list[Picture], sizes: list[Size], center_crop: bool) -> list[Finding]:
    enlarged, lost = (partial(of, sizes=sizes) for of in (enlargement, crop_loss))
    small = sorted((p for p in pictures if enlarged(p) > 1), key=lambda p: (-enlarged(p), p.name))
    cut = sorted((p for p in pictures if lost(p) > 1 / 3), key=lambda p: (-lost(p), p.name))
    is_square = len(sizes) == 1
    less = "--aspect_ratio_buckets cuts less off; " if is_square else ""
    parts = "with --no-center_crop each epoch sees another part" if center_crop else "each epoch sees another part"
    return [
        Finding(
            len(small),
            f"of {len(pictures):,} pictures are smaller than {crop_named(sizes)}, and will be enlarged",
            "Give larger ones, leave them out, or lower --resolution.",
            [f"{p.name} {size_of(p)}, enlarged {enlarged(p):,.1f} times" for p in small],
        ),
        Finding(
            len(cut),
            f"of {len(pictures):,} pictures lose more than a third to the {'square ' * is_square}crop",
            f"Crop them by hand around what matters; {less}{parts}.",
            [f"{p.name} {size_of(p)} loses {lost(p):.1%}" for p in cut],
        ),
    ]


def _copy_findings(pictures: list[Picture], looks: list[Look]) -> list[Finding]:
    places = {}
    for place, picture in enumerate(pictures):
        places.setdefault(picture.digest, []).append(place)
    equal = [group for group in places.values() if len(group) > 1]
    firsts = [group[0] for group in places.values()]
    alike = similar_groups([looks[place].fingerprint for place in firsts])
    alike = [[firsts[place] for place in group] for group in alike]
    each = "is seen once an epoch, so that the picture counts several times"
    findings = []
    for groups, text in ((equal, "are the same file as another"), (alike, "look nearly like another")):
        examples = [", ".join(pictures[place].name for place in group) for group in groups]
        advice = f"Each {each}: remove all but one, if that is not meant."
        count = sum(len(group) - 1 for group in groups)
        findings.append(Finding(count, f"of {len(pictures):,} pictures {text}", advice, examples))
    return findings


def _caption_findings(named: list[tuple[str, str]], long_captions, name: Callable[[str], str]) -> list[Finding]:
    empty = [picture for text, picture in named if not text.strip()]
    pictures_of = {}
    for text, picture in named:
        if text.strip():
            pictures_of.setdefault(text, {})[picture] = None
    shared = sorted(((t, len(p)) for t, p in pictures_of.items() if len(p) > 1), key=most_first)
    total = f"of {len(named):,} captions"
    return [
        Finding(
            len(empty),
            f"{total} are empty",
            "Write them: what is learned without words shows up whatever the prompt.",
            empty,
        ),
        Finding(
            len(shared),
            f"of {len(pictures_of):,} different captions stand at several pictures",
            "Say what tells the pictures apart: what the captions leave out, the style takes in.",
            [f"{quoted(text)} at {count:,} pictures" for text, count in shared],
        ),
        _long_finding(named, long_captions, name),
    ]


def _long_finding(named: list[tuple[str, str]], long_captions, name: Callable[[str], str]) -> Finding:
    total, advice = f"of {len(named):,} captions", "Put what matters first, or shorten them"
    if long_captions is None:
        wordy = set(find_wordy(text for text, _ in named))
        found = [f"{picture}: {quoted(text)}" for text, picture in named if text in wordy]
        advice += "; --pretrained_model_name_or_path counts their tokens."
        return Finding(len(found), f"{total} are probably longer than the text encoders see", advice, found)
    examples = [
        f"{name(one.name)}: {one.token_count} tokens, seen up to {quoted(one.seen[-30:])}, not {quoted(one.unseen)}"
        for one in long_captions
    ]
    return Finding(len(examples), f"{total} are longer than the text encoders see", f"{advice}.", examples)

"""The numbers of a data set: of what kinds and sizes its pictures are, what their crops lose, and its captions."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from rasengan.captions import LongCaption
from rasengan.data_survey import Look
from rasengan.imaging import Picture, Size, crop_size, resized_size


MOST_WORDS = 60  # an English caption with so many words and signs takes about the 77 tokens
COMMON_WORDS = 20
# Words that say nothing of a picture.
FILL_WORDS = set("a an and are at by for from in into is it its of on or the to with".split())
SIDES_PX = (128, 256, 512, 768, 1024, 1536)
ASPECTS = {"under 1:2": 0.5, "1:2 to 4:5": 0.8, "4:5 to 5:4": 1.25, "5:4 to 2:1": 2.0}


def tables(
    pictures: list[Picture],
    usable: list[Picture],
    looks: list[Look],
    captions: list[list[str]],
    long_captions: list[LongCaption] | None,
    sizes: list[Size],
) -> dict[str, dict[str, str]]:
    """Return the numbers as text, by title and label.

    Args:
        pictures: all, the broken ones included.
        usable: those that can be trained on, by the names to show.
        looks: at the usable ones.
        captions: of the usable ones.
        long_captions: likewise; None where tokens could not be counted.
        sizes: `imaging.crop_sizes`.
    """
    found = {"Pictures": _picture_facts(pictures, looks), "Captions": _caption_facts(captions, long_captions)}
    return found | ({"Sizes, upright": _size_facts(usable, sizes)} if usable else {})


def histograms(usable: list[Picture], captions: list[list[str]]) -> dict[str, dict[str, int]]:
    """Return how often what occurs, by title and label, in pictures that can be trained on and in their captions."""
    if not usable:
        return {}
    return {
        "Shorter side": _side_histogram(usable),
        "Width to height": _aspect_histogram(usable),
        "Common words, and how many captions have them": common_words(
            [text for several in captions for text in several]
        ),
    }


# --- pictures and captions ---


def _picture_facts(pictures: list[Picture], looks: list[Look]) -> dict[str, str]:
    kinds = sorted(Counter(look.kind for look in looks).items(), key=most_first)
    return {
        "in all": f"{len(pictures):,}, of which {len(looks):,} can be trained on",
        "formats and modes": ", ".join(f"{count:,} {kind}" for kind, count in kinds) or "none",
        "turned by EXIF": f"{sum(look.is_turned for look in looks):,}",
    }


def most_first(counted: tuple[str, int]) -> tuple[int, str]:
    """Return what to sort what was counted by, so that the commonest comes first."""
    return -counted[1], counted[0]


def _caption_facts(captions: list[list[str]], long_captions: list[LongCaption] | None) -> dict[str, str]:
    texts = [text for several in captions for text in several]
    facts = {"in all": f"{len(texts):,}, of which {len(set(texts)):,} differ"}
    if texts:
        pictures_of = Counter(text for several in captions for text in set(several)).values()
        each = sorted(map(len, captions))
        facts["captions of a picture"] = f"{each[0]} to {each[-1]}" if each[0] != each[-1] else f"{each[0]}"
        facts["pictures of a caption"] = f"{statistics.mean(pictures_of):.2f} on average, {max(pictures_of):,} at most"
    if long_captions is not None:
        return facts | {"too long for the encoders": f"{len(long_captions):,}"}
    likely = f"{len(find_wordy(texts)):,} have over {MOST_WORDS} words and signs, which is about what 77 tokens hold"
    return facts | {"tokens": f"not counted, since no base was given; {likely}"}


def find_wordy(texts: Iterable[str]) -> list[str]:
    """Return the texts of over `MOST_WORDS` words and signs."""
    # CLIP splits so; of scripts other than Latin it takes about a token for each letter.
    return [text for text in texts if len(re.findall(r"[A-Za-z']+|[^\sA-Za-z']", text)) > MOST_WORDS]


def common_words(captions: list[str]) -> dict[str, int]:
    """Return the commonest words, `FILL_WORDS` left out, and in how many captions each stands."""
    found = Counter()
    for text in captions:
        found.update(set(re.findall(r"[^\W\d_]+", text.casefold())) - FILL_WORDS)
    return dict(sorted(found.items(), key=most_first)[:COMMON_WORDS])


# --- sizes ---


def crop_loss(picture: Picture, sizes: list[Size]) -> float:
    """Return the share of the picture's area that its crop leaves out."""
    crop = crop_size(picture.height_px, picture.width_px, sizes)
    area = math.prod(resized_size(picture.height_px, picture.width_px, crop))
    return (area - math.prod(crop)) / area


def enlargement(picture: Picture, sizes: list[Size]) -> float:
    """Return how many times as long a picture's sides are once it covers its crop; below 1 it is made smaller."""
    height, width = crop_size(picture.height_px, picture.width_px, sizes)
    return max(height / picture.height_px, width / picture.width_px)


def size_of(picture: Picture) -> str:
    """Return a picture's size as text, the width first."""
    return f"{picture.width_px:,} x {picture.height_px:,} px"


def crop_named(sizes: list[Size]) -> str:
    """Return what to call the crop: by its side where there is one alone."""
    return f"{sizes[0][0]} px" if len(sizes) == 1 else "their crop"


def _size_facts(pictures: list[Picture], sizes: list[Size]) -> dict[str, str]:
    by_area = sorted(pictures, key=lambda picture: (picture.width_px * picture.height_px, picture.name))
    middle = [statistics.median(getattr(p, side) for p in pictures) for side in ("width_px", "height_px")]
    aspects = sorted(picture.width_px / picture.height_px for picture in pictures)
    losses = sorted(crop_loss(picture, sizes) for picture in pictures)
    small = sum(enlargement(picture, sizes) > 1 for picture in pictures)
    return {
        "smallest": f"{size_of(by_area[0])} ({by_area[0].name})",
        "median": f"{middle[0]:,g} x {middle[1]:,g} px",
        "largest": f"{size_of(by_area[-1])} ({by_area[-1].name})",
        "width / height": f"{aspects[0]:.2f} to {aspects[-1]:.2f}, median {statistics.median(aspects):.2f}",
        f"smaller than {crop_named(sizes)}": f"{small:,} of {len(pictures):,}",
        "cut off by the crop": f"{losses[0]:.1%} to {losses[-1]:.1%}, median {statistics.median(losses):.1%}",
    }


def _side_histogram(pictures: list[Picture]) -> dict[str, int]:
    between = [f"{least:,} to {next_px - 1:,} px" for least, next_px in pairwise(SIDES_PX)]
    labels = [f"under {SIDES_PX[0]:,} px", *between, f"{SIDES_PX[-1]:,} px or more"]
    sides = Counter(sum(min(p.height_px, p.width_px) >= edge for edge in SIDES_PX) for p in pictures)
    return {label: sides[place] for place, label in enumerate(labels)}


def _aspect_histogram(pictures: list[Picture]) -> dict[str, int]:
    places = Counter(sum(p.width_px / p.height_px >= edge for edge in ASPECTS.values()) for p in pictures)
    return {label: places[place] for place, label in enumerate([*ASPECTS, "2:1 or more"])}

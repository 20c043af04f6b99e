"""Texts beside pictures: a font that has their letters, lines that fit, and what no font here has in other words."""

import bisect
import math
import re
import unicodedata
from functools import lru_cache, partial

from PIL import ImageFont


# Fonts of many scripts that Linux, macOS and Windows have; Pillow finds them by these names.
FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf")
FONTS += ("Arial Unicode.ttf", "AppleSDGothicNeo.ttc", "segoeui.ttf", "YuGothM.ttc", "msyh.ttc", "malgun.ttf")


def wrap(
    text: str, font: ImageFont.FreeTypeFont, width_px: float, max_lines: int = 3, keeps_end: bool = False
) -> list[str]:
    """Return the text in at most `max_lines` lines that fit a width, cut with an ellipsis where it is longer.

    A number in parentheses at its end, a seed, stays behind the ellipsis; with `keeps_end` most of a line of any end.
    """
    text = _visible(text)
    number = re.search(r" \(\d+\)$", text)
    end = _end(text, font, width_px * 3 / 4) if keeps_end else number[0] if number else ""
    # A letter is a pixel wide at least: of a prompt of thousands no more is looked at.
    lines, rest = [], _drawable(text[: max_lines * math.ceil(width_px)], font)
    while rest and len(lines) < max_lines:
        is_cut = len(lines) == max_lines - 1 and font.getlength(rest) > width_px
        ellipsis = f" ...{end}" if is_cut else ""
        sizes = range(1, len(rest) + 1)
        over = partial(_is_wider, rest, ellipsis, font, width_px)
        fits = max(1, bisect.bisect_left(sizes, True, key=over))
        if fits < len(rest) and rest[fits] != " ":
            # A word longer than a line is cut, where a file's name has a mark in it behind that.
            mark = max(rest.rfind(mark, 0, fits) + 1 for mark in "/_-")
            fits = rest.rfind(" ", 0, fits) if " " in rest[:fits] else mark if mark > fits // 2 else fits
        lines.append(rest[:fits] + ellipsis)
        rest = rest[fits:].lstrip()
    return lines or [""]


def _is_wider(text: str, ellipsis: str, font: ImageFont.FreeTypeFont, width_px: float, length: int) -> bool:
    return font.getlength(text[:length] + ellipsis) > width_px


def _end(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Return as much of a text's end as fits a width."""
    end = _drawable(text[-math.ceil(width_px) :], font)
    start = bisect.bisect_left(range(len(end)), True, key=lambda start: font.getlength(end[start:]) <= width_px)
    return end[start:]


def _visible(text: str) -> str:
    """Return a text with single spaces, and without what is not drawn, or would turn round what follows it."""
    shown = (letter for letter in text if letter.isspace() or unicodedata.category(letter) not in {"Cc", "Cf"})
    return " ".join("".join(shown).split())


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the font that has most of a text's letters: Pillow's own, which has ASCII's, or the first of `FONTS`."""
    fonts, text = [ImageFont.load_default(size)], _visible(text)
    if not text.isascii():
        fonts += filter(None, (_system_font(name, size) for name in FONTS))
    letters = set(unicodedata.normalize("NFC", text))
    return max(fonts, key=lambda font: sum(_has(font, letter) for letter in letters))


@lru_cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    if letter.isspace():  # some of which Pillow refuses to draw
        return True
    # A font draws what it lacks as it draws what is no letter at all, and a mark by itself on a dotted circle.
    found, *none = (font.getmask(drawn) for drawn in (letter, "\uffff", "\u25cc\uffff"))
    return (found.size, bytes(found)) not in {(mask.size, bytes(mask)) for mask in none}


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Return a text with what a font lacks without its accents, or as the name of its script in brackets."""
    parts, script = [], None
    for letter in unicodedata.normalize("NFC", text):
        is_mark = unicodedata.category(letter).startswith("M")
        if is_mark and (not _has(font, letter) or parts[-1:] == [script]):
            continue  # it lies on another letter, which is there, or replaced
        part = letter if _has(font, letter) else _without_accents(letter)
        if not all(_has(font, plain) for plain in part):
            script = f"[{re.split('[ -]', unicodedata.name(letter, f'U+{ord(letter):X}'))[0]}]"
            part = script if parts[-1:] != [script] else ""
        parts += [part] if part else []
    return "".join(parts)


def _without_accents(letter: str) -> str:
    parts = unicodedata.normalize("NFKD", {"\u2013": "-", "\u2014": "-"}.get(letter, letter))
    return "".join(part for part in parts if not unicodedata.combining(part))

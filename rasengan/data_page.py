"""A data report as text for the terminal, and as a page that holds its pictures itself."""

import html
import io
import re
from typing import NamedTuple

from PIL import Image

from rasengan import pages, printable, sheets
from rasengan.data_report import Finding, Report


MOST_LINES = 5  # of examples in the terminal; the page has more
MOST_ON_PAGE = 200
BAR = 30  # characters
SHEET_PX = 192


class Tile(NamedTuple):
    """A picture of the contact sheet."""

    name: str
    note: str
    captions: list[str]
    thumbnail: bytes  # JPEG


def verdict(report: Report) -> str:
    """Return in a sentence or two whether training would start, and how much there is to look at."""
    starts = "Training would not start." if report.refusal else "Training would start."
    count = len(report.findings)
    return f"{starts} {count or 'No'} finding{'s' * (count != 1)}{' to look at' * bool(count)}."


# --- text ---


def as_text(report: Report, page: str | None) -> str:
    """Return the report for a terminal.

    Args:
        report: to show.
        page: where more examples are, for those that are left out; None if nowhere.
    """
    width = max(len(label) for table in report.tables.values() for label in table)
    parts = []
    for title, table in report.tables.items():
        parts.append([title, *(f"  {label:{width}}  {value}" for label, value in table.items())])
    parts += [[title, *_text_bars(counts)] for title, counts in report.histograms.items() if counts]
    parts += [
        [f"{f.count:,} {f.text}", *_text_examples(f.examples, page), f"  -> {f.advice}"] for f in report.findings
    ]
    return "\n\n".join("\n".join(lines) for lines in [*parts, [verdict(report)]])


def _text_bars(counts: dict[str, int]) -> list[str]:
    width, most = max(map(len, counts)), max(counts.values()) or 1
    return [f"  {name:{width}}  {n:>7,}  {'#' * -(-BAR * n // most)}".rstrip() for name, n in counts.items()]


def _text_examples(examples: list[str], page: str | None) -> list[str]:
    more = len(examples) - MOST_LINES
    where = f", in {page}" if page else ""
    return [f"  {line}" for line in examples[:MOST_LINES]] + [f"  and {more:,} more{where}"] * (more > 0)


# --- page ---


def as_page(report: Report, settings: str, tiles: list[Tile], picture_count: int) -> str:
    """Return the report as HTML, with a contact sheet.

    Args:
        report: to show.
        settings: what was looked at, and how, in a line.
        tiles: the pictures of the contact sheet.
        picture_count: of how many these are.
    """
    header = f"<p>{html.escape(settings)}</p><p>{verdict(report)}</p>"
    if report.refusal:
        header += f'<p class="refusal">{html.escape(printable(report.refusal))}</p>'
    tables = [f"<section><h2>{html.escape(t)}</h2>{pages.table(rows)}</section>" for t, rows in report.tables.items()]
    tables += [f"<section><h2>{html.escape(t)}</h2>{_bars(n)}</section>" for t, n in report.histograms.items() if n]
    parts = [
        "<h2>Findings</h2>",
        f'<div class="findings">{"".join(map(_finding, report.findings)) or "<p>Nothing to mend.</p>"}</div>',
        f'<div class="side">{"".join(tables)}</div>',
        f"<h2>{len(tiles):,} of {picture_count:,} pictures, as they will be cropped</h2>",
        f'<div class="sheet">{"".join(map(_figure, tiles))}</div>',
    ]
    return pages.document("Data report", header, "\n".join(parts))


def _bars(counts: dict[str, int]) -> str:
    most = max(counts.values()) or 1
    rows = (
        f"<tr><td><bdi>{html.escape(name)}</bdi></td><td>{count:,}</td>"
        f'<td><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in counts.items()
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def _finding(finding: Finding) -> str:
    shown = finding.examples[:MOST_ON_PAGE]
    title = f"{len(shown):,} of {len(finding.examples):,}" if len(finding.examples) > MOST_ON_PAGE else "which"
    listed = "".join(f"<li><bdi>{html.escape(line)}</bdi></li>" for line in shown)
    examples = f"<details{' open' * (len(shown) <= MOST_LINES)}><summary>{title}</summary><ul>{listed}</ul></details>"
    advice = re.sub(r"(--[\w-]+)", r"<code>\1</code>", html.escape(finding.advice))
    said = f"<p><b>{finding.count:,}</b> {html.escape(finding.text)}</p><p>{advice}</p>"
    return f'<div class="finding">{said}{examples}</div>'


def _figure(tile: Tile) -> str:
    name = html.escape(tile.name)
    captions = "".join(f'<p dir="auto">{html.escape(printable(text)) or "(empty)"}</p>' for text in tile.captions)
    title = f"<small><bdi>{name}</bdi> {html.escape(tile.note)}</small>"
    return f"<figure>{pages.image(tile.thumbnail, tile.name)}<figcaption>{title}{captions}</figcaption></figure>"


def as_sheet(tiles: list[Tile]) -> Image.Image:
    """Return the tiles' pictures as one, in up to eight columns."""
    images = [Image.open(io.BytesIO(tile.thumbnail)) for tile in tiles]
    return sheets.tiles(images, min(8, len(images)), SHEET_PX)

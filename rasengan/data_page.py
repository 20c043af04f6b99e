"""A data report as text for the terminal, and as a page that holds its pictures itself."""

import base64
import html
import io
import re
from typing import NamedTuple

from PIL import Image

from rasengan import sheets
from rasengan.data_report import Finding, Report, printable


MOST_LINES = 5  # of examples in the terminal; the page has more
MOST_ON_PAGE = 200
BAR = 30  # characters
SHEET_PX = 192

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --ground: #fff; --card: #f5f5f3;
  --bar: #9db8d9; --bad: #a33 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ddd; --soft: #999; --line: #3a3a3a; --ground: #181818;
  --card: #222; --bar: #46648a; --bad: #f0908a }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 76rem;
  color: var(--ink); background: var(--ground); overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; margin: 0 }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .6rem }}
header p {{ margin: .2rem 0; color: var(--soft) }}
header p.refusal {{ color: var(--bad) }}
.side {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 2.5rem }}
table {{ border-collapse: collapse; width: 100% }}
td {{ padding: .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }}
td:first-child {{ padding-right: 1rem; color: var(--soft); width: 42% }}
table.bars td:nth-child(2) {{ width: 4rem; padding-right: 1rem; text-align: right }}
.bar {{ height: .7rem; margin-top: .4rem; background: var(--bar); border-radius: 2px }}
.findings {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .7rem }}
.finding {{ background: var(--card); border-radius: 6px; padding: .7rem 1rem }}
.finding p {{ margin: 0 }} .finding p + p, summary {{ color: var(--soft) }}
code {{ white-space: nowrap }}
summary {{ cursor: pointer }} .finding ul {{ margin: .3rem 0 0; padding-left: 1.2rem }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.2rem .9rem }}
figure {{ margin: 0; min-width: 0 }}
img {{ display: block; width: 100%; height: auto; border-radius: 3px; outline: 1px solid var(--line) }}
figcaption {{ font-size: .82rem; line-height: 1.35; margin-top: .35rem; max-height: 8rem; overflow: auto }}
figcaption small {{ display: block; color: var(--soft) }}
figcaption p {{ margin: .1rem 0 0 }}
</style></head><body>
<header><h1>{title}</h1>{header}</header>
<h2>Findings</h2>
<div class="findings">{findings}</div>
<div class="side">{tables}</div>
<h2>{sheet_title}</h2>
<div class="sheet">{figures}</div>
</body></html>
"""


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
    tables = [f"<section><h2>{html.escape(t)}</h2>{_table(rows)}</section>" for t, rows in report.tables.items()]
    tables += [f"<section><h2>{html.escape(t)}</h2>{_bars(n)}</section>" for t, n in report.histograms.items() if n]
    return PAGE.format(
        title="Data report",
        header=header,
        findings="\n".join(map(_finding, report.findings)) or "<p>Nothing to mend.</p>",
        tables="\n".join(tables),
        sheet_title=f"{len(tiles):,} of {picture_count:,} pictures, as they will be cropped",
        figures="\n".join(map(_figure, tiles)),
    )


def _table(rows: dict[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


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
    source = f"data:image/jpeg;base64,{base64.b64encode(tile.thumbnail).decode()}"
    name = html.escape(tile.name)
    captions = "".join(f'<p dir="auto">{html.escape(printable(text)) or "(empty)"}</p>' for text in tile.captions)
    width, height = Image.open(io.BytesIO(tile.thumbnail)).size
    image = f'<img loading="lazy" src="{source}" alt="{name}" width="{width}" height="{height}">'
    title = f"<small><bdi>{name}</bdi> {html.escape(tile.note)}</small>"
    return f"<figure>{image}<figcaption>{title}{captions}</figcaption></figure>"


def as_sheet(tiles: list[Tile]) -> Image.Image:
    """Return the tiles' pictures as one, in up to eight columns."""
    images = [Image.open(io.BytesIO(tile.thumbnail)) for tile in tiles]
    return sheets.tiles(images, min(8, len(images)), SHEET_PX)

"""Pictures beside each other for the eye: grids as PNG, contact sheets as HTML; and how a picture is saved."""

import base64
import html
import io
import itertools
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from rasengan.files import write_atomically, write_if_free
from rasengan.labels import font_for, wrap


# A page that holds everything itself: it can be sent, and opened anywhere.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
h1 {{ font-size: 1.4rem }}
table.settings td {{ padding: 0 1rem 0 0; vertical-align: top; color: #555; overflow-wrap: anywhere }}
table.settings td:first-child {{ overflow-wrap: break-word; max-width: 45vw }}
section {{ margin: 2rem 0; border-top: 1px solid #ddd; padding-top: 1rem }}
section p {{ margin: 0 0 .6rem; max-width: 60rem; overflow-wrap: anywhere }}
.row {{ display: grid; gap: 12px; overflow-x: auto; grid-template-columns:
  repeat(var(--columns), minmax(clamp(6rem, var(--width), 16rem), max(6rem, var(--width)))) }}
figure {{ margin: 0 }}
img {{ display: block; max-width: 100%; height: auto; margin: 0 auto }}
figcaption {{ color: #555; text-align: center; overflow-wrap: anywhere }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} section {{ border-color: #444 }}
table.settings td, figcaption {{ color: #aaa }} }}
</style></head><body>
<h1>{title}</h1>
<table class="settings">{settings}</table>
{sections}
</body></html>
"""

MOST_PENDING = 8  # pictures that are not written yet
MOST_COLUMN_LINES = 8  # of a label over a column
GRID_ROWS = 8  # more rows go into further grids
MOST_GRID_PIXELS = 64 * 2**20  # likewise, but for labels and margins


# --- grids ---


def pair_grid(
    base_images: list[Image.Image], images: list[Image.Image], prompts: list[str], label: str
) -> Image.Image:
    """Return a grid of base and tuned pictures side by side, as many rows for each prompt; `label` is the tuned's."""
    rows = [list(pair) for pair in zip(base_images, images, strict=True)]
    row_labels = [prompt for prompt in prompts for _ in range(len(rows) // len(prompts))]
    return image_grid(rows, row_labels, ["base", label])


def image_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Return one picture of rows of pictures, all of one size, with a label over each column and row.

    Args:
        rows: pictures, as many in each row as there are column labels.
        row_labels: one for each row, wrapped to its width.
        column_labels: one for each column, wrapped to its width; the end, where a scale stands, is never cut off.
    """
    width, height = rows[0][0].size
    cell, margin = max(width, 256), max(width, 256) // 32
    size, line_height = cell // 18, round(cell / 18 * 1.4)
    total_width = len(column_labels) * (cell + margin) + margin
    height = round(height * cell / width)
    fonts = [font_for(label, size) for label in row_labels]
    labels = [wrap(*label, total_width - 2 * margin) for label in zip(row_labels, fonts, strict=True)]

    heads = []
    for label in column_labels:
        font = font_for(label, size)
        heads.append((font, wrap(label, font, cell, MOST_COLUMN_LINES, keeps_end=True)))

    header = max(len(lines) for _, lines in heads) * line_height + margin
    total_height = header + sum(len(lines) * line_height + height + 2 * margin for lines in labels)
    grid = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(grid)
    lefts = [margin + column * (cell + margin) for column in range(len(column_labels))]
    for left, (font, lines) in zip(lefts, heads, strict=True):
        for number, line in enumerate(lines):
            draw.text((left + cell / 2, margin + number * line_height), line, "black", font, anchor="ma")
    top = header
    for row, font, lines in zip(rows, fonts, labels, strict=True):
        top += margin
        for line in lines:
            draw.text((margin, top), line, "#444444", font)
            top += line_height
        for left, image in zip(lefts, row, strict=True):
            grid.paste(image.convert("RGB").resize((cell, height), Image.Resampling.LANCZOS), (left, top))
        top += height + margin
    return grid


def tiles(images: list[Image.Image], columns: int, side_px: int, gap_px: int = 4) -> Image.Image:
    """Return square pictures row after row, each `side_px` a side, on grey, where white ones end too."""
    step_px = side_px + gap_px
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step_px + gap_px, rows * step_px + gap_px), "#d0d0d0")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        small = image.convert("RGB").resize((side_px, side_px), Image.Resampling.LANCZOS)
        sheet.paste(small, (gap_px + column * step_px, gap_px + row * step_px))
    return sheet


# --- contact sheets ---


def contact_sheet(
    title: str, settings: dict[str, object], rows: list[tuple[str, list[Path]]], column_labels: list[str]
) -> str:
    """Return a page of rows of pictures, which it holds itself, as JPEGs of at most 512 px a side.

    Args:
        title: of the page.
        settings: what the pictures were drawn with.
        rows: a text, and the files of its pictures, as many as there are column labels.
        column_labels: one for each column.
    """
    listed = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    )
    sections = []
    for text, files in rows:
        figures = [_figure(file, label) for file, label in zip(files, column_labels, strict=True)]
        size = f"--columns: {len(figures)}; --width: {max(width for _, width in figures)}px"
        row = f'<div class="row" style="{size}">{"".join(figure for figure, _ in figures)}</div>'
        sections.append(f"<section><p>{html.escape(text)}</p>{row}</section>")
    return PAGE.format(title=html.escape(title), settings=listed, sections="\n".join(sections))


def _figure(file: Path, label: str) -> tuple[str, int]:
    """Return a picture with its label, and its width in px."""
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((512, 512), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
    size = f'width="{small.width}" height="{small.height}"'
    label = html.escape(label)
    figure = f'<figure><img src="{source}" alt="{label}" {size}><figcaption>{label}</figcaption></figure>'
    return figure, small.width


# --- files ---


def write_together(
    output_dir: Path,
    rows: list[tuple[str, list[Path]]],
    columns: list[tuple[str, str]],
    settings: dict[str, object],
) -> None:
    """Write a contact sheet of pictures, and where there are several columns grids too, in place of older grids.

    Args:
        output_dir: of `contact_sheet.html`, and of `grid.png`, or `grid-001.png` and so on where rows are many.
        rows: a text, and the files of its pictures, one for each column.
        columns: a label, and what the column was drawn with.
        settings: what all were drawn with.
    """
    for old in output_dir.glob("grid*.png"):  # a copy under another name, or another program's, stays
        if re.fullmatch(r"grid(-\d+)?\.png", old.name) and "grid" in read_about(old):
            old.unlink(missing_ok=True)  # another run may be at it too
    labels = [label for label, _ in columns]
    page = contact_sheet("Pictures", settings | dict(columns), rows, labels)
    write_atomically(output_dir / "contact_sheet.html", page.encode())
    if len(columns) == 1:
        return
    with Image.open(rows[0][1][0]) as first:
        row_pixels = len(columns) * first.width * first.height
    # Pillow takes a picture of too many pixels for an attack, also where an old grid is looked at.
    step = max(1, min(GRID_ROWS, MOST_GRID_PIXELS // row_pixels))
    starts = range(0, len(rows), step)
    for number, start in enumerate(starts, 1):
        shown = rows[start : start + step]
        images = [[Image.open(file) for file in files] for _, files in shown]
        name = "grid.png" if len(starts) == 1 else f"grid-{number:03d}.png"
        grid = image_grid(images, [text for text, _ in shown], labels)
        save_png(output_dir / name, grid, {"grid": f"{number} of {len(starts)}"} | settings)


class PictureWriter:
    """Writes pictures while others are drawn; leaving it waits for all of them, and raises what kept one from it."""

    def __init__(self):
        self.pool, self.pending = ThreadPoolExecutor(1, thread_name_prefix="picture"), deque()

    def __enter__(self) -> "PictureWriter":
        return self

    def write(self, path: Path, image: Image.Image, about: dict[str, object]) -> None:
        """Begin to write a picture, as `save_beside` does; waits where many are not written yet.

        Raises:
            OSError: an earlier one could not be written.
        """
        self.pending.append(self.pool.submit(save_beside, path, image, about))
        while len(self.pending) > MOST_PENDING:
            self.pending.popleft().result()

    def __exit__(self, error_type, *_) -> None:
        self.pool.shutdown()
        if error_type is None:
            for future in self.pending:
                future.result()


def picture_name(prompt: str, seed: int, kind: str) -> str:
    """Return a file name for a picture that tells it from others; what a prompt has besides letters is left out."""
    prompt = os.fsencode(re.sub(r"\W+", "-", prompt).strip("-")[:40])[:80].decode(errors="ignore")
    kind = os.fsencode(slug(kind))[-80:].decode(errors="ignore")  # the end, which has the scale
    return f"{seed}-{prompt}-{kind}.png"


def slug(kind: str) -> str:
    """Return what a file name has of a kind of picture; a scale keeps its sign."""
    return re.sub(r"[^\w.]+", "-", re.sub(r" -(?=[\d.])", " minus ", kind))


def place_of(path: Path, about: dict[str, object]) -> Path:
    """Return where a picture is, or is to be written: the first free name where none is made from the same.

    Args:
        path: that it has in an empty folder; beside pictures that were made otherwise its name ends in -2, -3, ...
        about: what it is made from, as `save_png` takes it.
    """
    for number in itertools.count(1):
        file = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not os.path.lexists(file) or read_about(file) == _as_text(about):
            return file


def _as_text(about: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in about.items()}


def read_about(path: Path) -> dict[str, str]:
    """Return what a picture was made from, as `save_png` wrote it; nothing of a file that it did not write."""
    try:
        with Image.open(path) as image:
            return {name: value for name, value in image.info.items() if isinstance(value, str)}
    except Exception:  # Pillow's plugins raise what they like
        return {}


def save_png(path: Path, image: Image.Image, about: dict[str, object] | None = None) -> None:
    """Write a picture whole or not at all, with what it was made from in its metadata, as text by name."""
    write_atomically(path, _as_png(image, about or {}))


def save_beside(path: Path, image: Image.Image, about: dict[str, object]) -> Path:
    """Write a picture as `save_png` does, over none that was made otherwise, and return its `place_of`.

    The name is taken when the picture is whole: runs that draw into one folder at the same time keep theirs apart.
    """
    content = _as_png(image, about)
    while not write_if_free(file := place_of(path, about), content):
        if read_about(file) == _as_text(about):
            write_atomically(file, content)
            break
    return file


def _as_png(image: Image.Image, about: dict[str, object]) -> bytes:
    metadata = PngImagePlugin.PngInfo()
    for name, value in about.items():
        metadata.add_itxt(name, str(value))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=metadata)
    return file.getvalue()

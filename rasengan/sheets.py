"""Pictures beside each other for the eye: grids as PNG, and contact sheets as HTML."""

import html
import io
import re
from pathlib import Path

from PIL import Image, ImageDraw

from rasengan import pages, picture_files
from rasengan.files import write_atomically
from rasengan.labels import font_for, wrap


MOST_COLUMN_LINES = 8  # of a label over a column
GRID_ROWS = 8  # more rows go into further grids
MOST_GRID_PIXELS = 64 * 2**20  # likewise, but for labels and margins
CONTACT_PX = 512


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
    """Return a page of rows of pictures, which it holds itself, as JPEGs of at most `CONTACT_PX` a side.

    Args:
        title: of the page.
        settings: what the pictures were drawn with.
        rows: a text, and the files of its pictures, as many as there are column labels.
        column_labels: one for each column.
    """
    parts = [pages.table({name: str(value) for name, value in settings.items()})]
    for text, files in rows:
        jpegs = [_small(file) for file in files]
        figures = "".join(
            f"<figure>{pages.image(jpeg, label)}<figcaption>{html.escape(label)}</figcaption></figure>"
            for jpeg, label in zip(jpegs, column_labels, strict=True)
        )
        width_px = max(Image.open(io.BytesIO(jpeg)).width for jpeg in jpegs)
        size = f"--columns: {len(jpegs)}; --width: {width_px}px"
        parts.append(f'<p>{html.escape(text)}</p><div class="row" style="{size}">{figures}</div>')
    return pages.document(title, "", "\n".join(parts))


def _small(file: Path) -> bytes:
    with Image.open(file) as image:
        return pages.as_jpeg(image, CONTACT_PX, quality=88)


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
        if re.fullmatch(r"grid(-\d+)?\.png", old.name) and "grid" in picture_files.read_about(old):
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
        picture_files.save_png(output_dir / name, grid, {"grid": f"{number} of {len(starts)}"} | settings)

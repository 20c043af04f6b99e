import base64
import io
import re
import time
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rasengan import labels, picture_files, sheets


# --- grids ---


def pixels(image, *box):
    return np.asarray(image.crop(box) if box else image, dtype=int)


@pytest.mark.parametrize("size", [(512, 512), (320, 200), (64, 96)])
def test_a_grid_holds_each_picture_in_its_place_under_its_labels(size):
    colors = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
    rows = [[Image.new("RGB", size, color) for color in row] for row in colors]
    grid = sheets.image_grid(rows, ["first", "second"], ["base", "LoRA x 1", "other"])
    width = max(256, size[0])
    height, margin = round(size[1] * width / size[0]), width // 32
    assert grid.mode == "RGB"
    assert grid.width == margin + 3 * (width + margin)

    tops = []
    array = pixels(grid)
    for row in colors:
        for column, color in enumerate(row):
            ys, xs = np.nonzero((array == Image.new("RGB", (1, 1), color).getpixel((0, 0))).all(axis=-1))
            left = margin + column * (width + margin)
            assert (xs.min(), xs.max()) == (left, left + width - 1)
            assert ys.max() - ys.min() == height - 1
            assert len(xs) == width * height
        tops.append(ys.min())
    assert tops[1] >= tops[0] + height + margin
    assert grid.height >= tops[1] + height + margin

    # Every label, and nothing else, is ink on the white around the pictures.
    column_labels, first, second = (
        array[: tops[0] // 2],
        array[tops[0] // 2 : tops[0]],
        array[tops[0] + height : tops[1]],
    )
    for column in range(3):
        left = margin + column * (width + margin)
        ink = np.nonzero((column_labels[:, left : left + width] < 128).all(axis=-1))[1]
        assert abs((ink.min() + ink.max()) / 2 - width / 2) < 3
    for strip in (first, second):
        assert (strip < 160).all(axis=-1).any()
        assert (strip[:, grid.width // 2 :] == 255).all()
    assert (array[:, : margin - 1] == 255).all()


def test_a_picture_keeps_its_content_and_what_is_smaller_fits_its_cell():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    grid = sheets.image_grid([[picture, Image.new("L", (100, 100), 0)]], ["a prompt"], ["base", "tuned"])
    top = grid.height - 9 - 300
    assert (pixels(grid, 9, top, 309, top + 300) == pixels(picture)).all()
    assert (pixels(grid, 318, top, 618, top + 300) == 0).all()


def test_a_row_without_a_picture_for_each_column_is_an_error():
    with pytest.raises(ValueError):
        sheets.image_grid([[Image.new("RGB", (8, 8))]], ["a"], ["base", "tuned"])


@pytest.mark.parametrize(
    ("row_label", "column_label"),
    [
        ("a wizard in a forest of giant mushrooms " * 9, "LoRA"),
        ("in heavy rain under a red umbrella, cinematic lighting, by a master painter " * 9, "LoRA"),
        ("supercalifragilistic" * 9, "LoRA"),
        ("a wizard", "step 2000 of a run with a very long name, longer than its column"),
    ],
)
def test_labels_stay_off_the_margins(row_label, column_label):
    rows = [[Image.new("RGB", (512, 512), "red"), Image.new("RGB", (512, 512), "red")]]
    grid = sheets.image_grid(rows, [row_label], ["base", column_label])
    for left in (0, grid.width - 15):  # margins are 16 px, and a letter may lean out by one
        assert pixels(grid, left, 0, left + 15, grid.height).min() == 255


def test_a_long_label_is_wrapped_into_full_lines_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(size=28)
    words = [f"word{number}" for number in range(100)]
    lines = labels.wrap(" ".join(words), font, 500)
    assert len(lines) == 3
    assert lines[-1].endswith(" ...")
    shown = " ".join(lines).removesuffix(" ...").split()
    assert shown == words[: len(shown)]
    for line, following in zip(lines, [lines[1].split()[0], lines[2].split()[0]], strict=False):
        assert font.getlength(line) <= 500 < font.getlength(f"{line} {following}")
    assert labels.wrap("short", font, 500) == ["short"]
    assert labels.wrap(" ".join(words[:4]), font, 500) == [" ".join(words[:4])]


@pytest.mark.parametrize("letter", ["é", "ü", "ñ", "—"])
def test_letters_outside_ascii_are_not_drawn_as_a_box(letter, monkeypatch):
    monkeypatch.setattr(labels, "FONTS", ("no font has this name.ttf",))
    font = labels.font_for(letter, 28)
    (line,) = labels.wrap(letter, font, 500)
    box = font.getmask("\uffff")  # which is no letter
    assert bytes(font.getmask(letter)) == bytes(box)
    assert bytes(font.getmask(line)) != bytes(box)


def test_of_a_text_of_any_length_three_lines_are_found_soon():
    font = labels.font_for("a", 28)
    began_s = time.process_time()
    lines = labels.wrap("word " * 100_000, font, 900)
    assert time.process_time() - began_s < 2  # 0.02 s, where cutting letter after letter takes hours
    assert [len(line.split()) for line in lines[:2]] == [len(lines[0].split())] * 2
    assert lines[2].endswith("word ...")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a café — naïve", "a cafe - naive"),
        ("ラーメン 忍者, a ninja", "[KATAKANA] [CJK], a ninja"),
        ("Красный круг", "[CYRILLIC] [CYRILLIC]"),
        ("ein \ue000", "ein [U+E000]"),
        ("a\nб\u2029в \t\x07", "a [CYRILLIC] [CYRILLIC]"),
        ("नमस्ते दुनिया", "[DEVANAGARI] [DEVANAGARI]"),
        ("a \u202ered box\u200b, \x07 \x1b[1mbold", "a red box, [1mbold"),
        ("x\u0331y n\u0303\u0331", "xy n"),
        ("[a][a] \u2163\u2163", "[a][a] IVIV"),
    ],
)
def test_a_label_says_what_no_font_here_can_draw(monkeypatch, text, shown):
    monkeypatch.setattr(labels, "FONTS", ("no font has this name.ttf",))
    assert labels.wrap(text, labels.font_for(text, 28), 900) == [shown]


@pytest.mark.parametrize("text", ["a café — naïve", "Красный круг", "cafe\u0301"])
def test_a_label_is_drawn_by_a_font_of_the_system_that_has_its_letters(text):
    font = labels.font_for(text, 28)
    if font.getname() == ImageFont.load_default(28).getname():
        pytest.skip("no font of many scripts is installed")
    assert labels.wrap(text, font, 900) == [unicodedata.normalize("NFC", text)]
    assert labels.font_for("plain", 28).getname() == ImageFont.load_default(28).getname()


def test_a_mark_that_no_font_has_leaves_no_box_beside_what_stands_for_its_letter():
    text = "नमस्ते दुनिया สวัสดี தமிழ்"
    shown = " ".join(labels.wrap(text, labels.font_for(text, 28), 900))
    alone = [letter for letter in shown if unicodedata.category(letter).startswith("M")]
    assert shown == text or not alone


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize("length", [1, 60, 600])
def test_columns_of_long_names_are_told_apart_and_show_their_scales(side, length, monkeypatch):
    drawn, draw = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, *how, **options: drawn.append(how) or draw(self, *how, **options)
    )
    columns = [
        f"{'style_' * length}epoch-00000{epoch}.safetensors x {scale}" for epoch in (4, 8) for scale in (0.5, 1)
    ]
    image = Image.new("RGB", (side, side), "red")
    grid = sheets.image_grid([[image] * 5], ["a prompt"], ["base", *columns])
    cell, margin = max(side, 256), max(side, 256) // 32
    lines = {}
    for (left, _), line, _, font, *_ in drawn:
        lines.setdefault(left, []).append(line)
        assert font.getlength(line) <= grid.width if line == "a prompt" else cell
    heads = [" ".join(lines[margin + column * (cell + margin) + cell / 2]) for column in range(5)]
    assert heads[0] == "base"
    for head, label in zip(heads[1:], columns, strict=True):
        assert head.replace(" ", "").endswith(
            label[-24:].replace(" ", "") if length < 600 else label[-12:].replace(" ", "")
        )
    assert len(set(heads)) == 5
    tops = {top for (_, top), line, *_ in drawn if line != "a prompt"}
    ((_, below),) = [place for place, line, *_ in drawn if line == "a prompt"]
    assert max(tops) + cell / 18 < below, "the rows begin below the longest label"


def test_a_seed_behind_a_long_prompt_is_not_cut_off():
    font = ImageFont.load_default(28)
    lines = [labels.wrap(f"{'a very ' * 100}long road ({seed})", font, 500) for seed in (0, 11)]
    assert [found[-1].rpartition(" ... ")[2] for found in lines] == ["(0)", "(11)"]
    assert all(font.getlength(line) <= 500 for found in lines for line in found)


# --- contact sheets ---


def test_a_contact_sheet_holds_its_pictures_and_escapes_what_people_typed(tmp_path):
    for name, color, size in (("a", "red", (1024, 512)), ("b", "blue", (64, 96))):
        Image.new("RGB", size, color).save(tmp_path / f"{name}.png")
    text = '<script>alert("らせんがん")</script> & {braces}'
    rows = [(text, [tmp_path / "a.png", tmp_path / "b.png"])]
    page = sheets.contact_sheet("a <b>title</b>", {"seed": "<i>0</i>"}, rows, ["base", "<u>LoRA</u> x 1"])
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;らせんがん&quot;)&lt;/script&gt; &amp; {braces}" in page
    assert "<u>" not in page
    assert "&lt;u&gt;LoRA&lt;/u&gt; x 1" in page
    assert "<title>a &lt;b&gt;title&lt;/b&gt;</title>" in page
    assert "&lt;i&gt;0&lt;/i&gt;" in page
    assert not re.findall(r"(?:src|href)=.(?!data:)", page)
    found = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    assert [image.size for image in found] == [(512, 256), (64, 96)]
    assert found[0].getpixel((0, 0))[0] > 240
    assert found[1].getpixel((0, 0))[2] > 240


def test_a_contact_sheet_has_a_row_of_equal_columns_for_each_text(tmp_path):
    for name, side in (("small", 64), ("large", 2048)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    rows = [("a", [tmp_path / "small.png"] * 9), ("b", [tmp_path / "large.png"] * 9)]
    page = sheets.contact_sheet("Pictures", {}, rows, [f"{'long_' * 40} x {n}" for n in range(9)])
    assert re.findall(r'class="row" style="([^"]+)"', page) == [f"--columns: 9; --width: {n}px" for n in (64, 512)]
    assert "repeat(var(--columns), minmax(" in page


def test_a_grid_has_no_more_rows_than_pillow_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "MOST_GRID_PIXELS", 3 * 2 * 64**2)
    files = [tmp_path / f"{number}.png" for number in range(10)]
    for file in files:
        picture_files.save_png(file, Image.new("RGB", (64, 64)))
    rows = [(f"row {n}", files[2 * n : 2 * n + 2]) for n in range(5)]
    sheets.write_together(tmp_path, rows, [("base", ""), ("tuned", "")], {})
    assert sorted(path.name for path in tmp_path.glob("grid*")) == ["grid-001.png", "grid-002.png"]
    assert Image.open(tmp_path / "grid-001.png").height > Image.open(tmp_path / "grid-002.png").height

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rasengan import data_page, data_report, data_survey, imaging, pages, sheets
from rasengan.captions import LongCaption
from rasengan.data_report import Finding, Report
from rasengan.data_survey import Look, Usable
from rasengan.imaging import Picture
from rasengan.near_duplicates import Fingerprint


def report_of(sizes, captions=None, long_captions=(), *, kinds=None, sizes_of_crops=((512, 512),), center_crop=True):
    """The report of pictures of (width, height), all different, with a caption each."""
    pictures = [Picture(f"{n}.png", f"digest {n}", h, w, None, n) for n, (w, h) in enumerate(sizes)]
    captions = captions or [[f"caption {n}"] for n in range(len(sizes))]
    kinds = kinds or ["PNG RGB"] * len(sizes)
    # Hashes of which each pair differs in many bits.
    hashes = np.random.default_rng(0).integers(0, 2**63, len(sizes)).tolist()
    looks = [Look(kind, False, Fingerprint(h, bytes(48)), b"") for kind, h in zip(kinds, hashes, strict=True)]
    usable = Usable(list(range(len(sizes))), pictures, captions, [])
    options = {"directory": None, "sizes": list(sizes_of_crops), "center_crop": center_crop}
    options |= {"unknown": [], "refused": ""}
    long_captions = None if long_captions is None else list(long_captions)
    return data_report.make_report(pictures, usable, looks, [], [], long_captions, **options)


def found(report, words):
    """The one finding that has these words, or None."""
    matching = [finding for finding in report.findings if words in finding.text]
    assert len(matching) <= 1
    return matching[0] if matching else None


# --- numbers ---


def test_a_good_set_has_no_findings_and_says_its_sizes():
    report = report_of([(512, 512), (600, 800), (1024, 768), (2000, 1600)])
    assert report.findings == []
    assert report.tables["Sizes, upright"] == {
        "smallest": "512 x 512 px (0.png)",
        "median": "812 x 784 px",
        "largest": "2,000 x 1,600 px (3.png)",
        "width / height": "0.75 to 1.33, median 1.12",
        "smaller than 512 px": "0 of 4",
        "cut off by the crop": "0.0% to 24.9%, median 22.5%",
    }
    assert report.histograms["Shorter side"] == {
        "under 128 px": 0,
        "128 to 255 px": 0,
        "256 to 511 px": 0,
        "512 to 767 px": 2,
        "768 to 1,023 px": 1,
        "1,024 to 1,535 px": 0,
        "1,536 px or more": 1,
    }


def test_a_third_is_not_more_than_a_third():
    assert report_of([(6000, 4000), (4000, 6000), (1500, 1000), (768, 512)]).findings == []
    cut = found(report_of([(6000, 4000), (770, 512), (512, 1024), (1024, 512), (5120, 512)]), "lose more than a third")
    assert (cut.count, cut.text) == (4, "of 5 pictures lose more than a third to the square crop")
    assert cut.examples == [
        "4.png 5,120 x 512 px loses 90.0%",
        "2.png 512 x 1,024 px loses 50.0%",
        "3.png 1,024 x 512 px loses 50.0%",
        "1.png 770 x 512 px loses 33.5%",
    ]
    assert "--no-center_crop" in cut.advice
    assert "--no-center_crop" not in found(report_of([(9000, 512)], center_crop=False), "a third").advice


def test_with_buckets_less_is_cut_off_and_pictures_are_measured_by_their_own_crop():
    sizes = [(640, 384), (512, 1024), (570, 450), (3000, 500)]
    report = report_of(sizes, sizes_of_crops=imaging.crop_sizes(512, 64))
    assert report.tables["Sizes, upright"]["smaller than their crop"] == "1 of 4"
    assert found(report, "enlarged").text == "of 4 pictures are smaller than their crop, and will be enlarged"
    assert found(report, "enlarged").examples == ["2.png 570 x 450 px, enlarged 1.0 times"]
    cut = found(report, "lose more than a third")
    assert (cut.count, cut.text) == (1, "of 4 pictures lose more than a third to the crop")
    assert "--aspect_ratio_buckets" not in cut.advice
    assert "--aspect_ratio_buckets" in found(report_of(sizes), "lose more than a third").advice


def test_smaller_pictures_are_named_the_smallest_first():
    small = found(report_of([(512, 512), (2048, 511), (100, 90), (512, 4)]), "enlarged")
    assert small.text == "of 4 pictures are smaller than 512 px, and will be enlarged"
    assert small.examples == [
        "3.png 512 x 4 px, enlarged 128.0 times",
        "2.png 100 x 90 px, enlarged 5.7 times",
        "1.png 2,048 x 511 px, enlarged 1.0 times",
    ]


def test_kinds_are_counted_the_commonest_first():
    report = report_of([(512, 512)] * 4, kinds=["PNG L", "JPEG RGB", "PNG L", "GIF P"])
    assert report.tables["Pictures"]["formats and modes"] == "2 PNG L, 1 GIF P, 1 JPEG RGB"


# --- captions ---


def test_without_a_tokenizer_long_captions_are_estimated_in_words():
    exact, over = "word " * 59 + "word", "word " * 60 + "word"
    report = report_of([(512, 512)] * 3, [[exact], [over], ["字" * 61]], None)
    assert report.tables["Captions"]["tokens"].startswith("not counted, since no base was given; 2 have over 60 words")
    long = found(report, "probably longer")
    assert long.count == 2
    assert long.examples[0].startswith('1.png: "word word')
    assert "--pretrained_model_name_or_path" in long.advice


def test_with_a_tokenizer_it_is_said_where_a_caption_is_cut():
    long_captions = [LongCaption("1.png", 90, "all that is seen of it, to the end", "what is\x1b[31m beyond")]
    report = report_of([(512, 512)] * 2, long_captions=long_captions)
    assert report.tables["Captions"]["too long for the encoders"] == "1"
    assert found(report, "longer than the text").examples == [
        '1.png: 90 tokens, seen up to "that is seen of it, to the end", not "what is\\x1b[31m beyond"'
    ]


def test_shared_and_empty_captions_are_told_apart():
    captions = [["a"], ["a", "b"], ["b", "b"], [" \t"], [""], ["c", "c"]]
    report = report_of([(512, 512)] * 6, captions)
    assert report.tables["Captions"] == {
        "in all": "9, of which 5 differ",
        "captions of a picture": "1 to 2",
        "pictures of a caption": "1.40 on average, 2 at most",
        "too long for the encoders": "0",
    }
    shared = found(report, "stand at several pictures")
    assert (shared.count, shared.text) == (2, "of 3 different captions stand at several pictures")
    assert shared.examples == ['"a" at 2 pictures', '"b" at 2 pictures']
    assert found(report, "are empty").examples == ["3.png", "4.png"]


# --- text and page ---


TILE_NAME = '"><img src=x onerror=alert(1)>.png'
HOSTILE = ["<script>alert('x')</script>", 'a "quoted" & <b>bold</b>', "\x1b[31mred\u202e", "\udcff", ""]


@pytest.fixture
def tile():
    return data_page.Tile(TILE_NAME, "64 x 64", HOSTILE, pages.as_jpeg(Image.new("RGB", (64, 64), "red")))


@pytest.fixture
def hostile_report():
    findings = [Finding(1, HOSTILE[0], "Do <so> with --a_flag.", [data_report.printable(text) for text in HOSTILE])]
    return Report({HOSTILE[0]: {HOSTILE[1]: HOSTILE[0]}}, {HOSTILE[0]: {HOSTILE[0]: 3}}, findings, HOSTILE[0])


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.seen, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def test_the_page_escapes_whatever_it_shows(hostile_report, tile):
    page = data_page.as_page(hostile_report, HOSTILE[0], [tile], 7)
    page.encode()  # no lone surrogate
    tags = Tags(page)
    assert "script" not in {tag for tag, _ in tags.seen}
    assert "b" in {tag for tag, _ in tags.seen}
    (image,) = [attributes for tag, attributes in tags.seen if tag == "img"]
    assert image["alt"] == TILE_NAME
    assert image["loading"] == "lazy"
    assert image["src"].startswith("data:image/jpeg;base64,")
    for text in HOSTILE[:2]:
        assert text in tags.text
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "<code>--a_flag</code>" in page
    assert "1 of 7 pictures, as they will be cropped" in page
    assert not re.search(r"https?://|url\(|@import", page), "it holds everything itself"


def test_the_text_has_no_control_characters_and_says_where_the_rest_is(hostile_report):
    text = data_page.as_text(hostile_report, "page.html")
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    finding = Finding(9, "of 9 pictures are so", "Mend them.", [f"{n}.png" for n in range(9)])
    report = Report({"Pictures": {"in all": "9"}}, {"Sides": {"small": 0, "large": 9, "huge": 1}}, [finding], "")
    assert data_page.as_text(report, "page.html").splitlines() == [
        "Pictures",
        "  in all  9",
        "",
        "Sides",
        "  small        0",
        f"  large        9  {'#' * 30}",
        "  huge         1  ####",
        "",
        "9 of 9 pictures are so",
        *(f"  {n}.png" for n in range(5)),
        "  and 4 more, in page.html",
        "  -> Mend them.",
        "",
        "Training would start. 1 finding to look at.",
    ]


def test_the_verdict():
    assert data_page.verdict(Report({}, {}, [], "")) == "Training would start. No findings."
    assert data_page.verdict(Report({}, {}, [], "no")) == "Training would not start. No findings."


def test_a_page_of_many_examples_shows_some_and_says_of_how_many():
    finding = Finding(300, "of 300 are so", "Mend.", [f"{n:03d}.png" for n in range(300)])
    tags = Tags(data_page.as_page(Report({}, {}, [finding], ""), "", [], 0))
    assert "200 of 300" in tags.text
    assert "199.png" in tags.text
    assert "200.png" not in tags.text


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 5, [0, 1, 2]), (10, 5, [0, 2, 4, 6, 8]), (0, 5, [])])
def test_what_is_shown_is_evenly_spread(count, most, expected):
    assert data_survey.spread(count, most) == expected
    assert len(data_survey.spread(1221, 200)) == 200


def test_names_are_shortened_inside_their_folder_alone(tmp_path):
    folder = str(tmp_path / "set")
    assert data_report.short_name(f"{folder}/below/a.png", folder) == "below/a.png"
    assert data_report.short_name(f"{folder}2/a.png", folder) == f"{folder}2/a.png"
    assert data_report.short_name("a\nb.png", None) == "a\\nb.png"


def test_tiles_stand_row_after_row():
    colors = ["red", "lime", "blue", "yellow", "white"]
    sheet = np.asarray(sheets.tiles([Image.new("RGB", (30, 30), color) for color in colors], 3, 20, gap_px=2))
    assert sheet.shape == (2 * 22 + 2, 3 * 22 + 2, 3)
    for place, color in enumerate(colors):
        top, left = 2 + place // 3 * 22, 2 + place % 3 * 22
        expected = Image.new("RGB", (1, 1), color).getpixel((0, 0))
        assert (sheet[top : top + 20, left : left + 20] == expected).all()

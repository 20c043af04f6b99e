import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rasengan import evaluation_page, loss_comparison, pages
from rasengan.evaluation import Drawn
from rasengan.evaluation_page import Pair
from rasengan.imaging import Picture
from rasengan.loss_comparison import Losses, Point


HOSTILE = '<script>alert(1)</script> & "quotes" \x1b[31m 猫'


class Rows:
    """What is looked at of samples."""

    pictures = [Picture("folder/<b>one.png", "digest 1", 64, 64, None), Picture("two.png", "digest 2", 64, 64, None)]
    captions, rows = [[HOSTILE], ["two", ""]], [0, 1]


def losses_of(*means):
    return torch.tensor([[mean - 0.01, mean, mean, mean + 0.01] for mean in means], dtype=torch.float64)


@pytest.fixture
def figures():
    losses = {
        "base": Losses(losses_of(1.2, 1.4), losses_of(1.1, 1.3)),
        "tuned": Losses(losses_of(1.0, 1.1), losses_of(0.6, 0.7)),
    }
    points = [
        Point(0, losses["base"]),
        Point(40, losses["tuned"]),
        Point(20, Losses(losses_of(0.9, 1.0), losses_of(1, 1))),
    ]
    shares = {"style": 0.1, "content": 0.8, "thing": 0.9, "color": 1.0, "position": 0.9, "count": 1.0}
    shares |= {"pattern": 0.7, "ground": 1.0}
    judge = {}
    for kind, style in (("base", 0.1), ("tuned", 0.95)):
        seeds = {5: shares | {"style": style - 0.05}, 7: shares | {"style": style + 0.05}}
        judge[kind] = {"seeds": seeds, "mean": shares | {"style": style}}
    clip = {"model": "clip", "reference_pictures": 9}
    clip |= {"base": {"score": 30.5, "cmmd": 2.25, "kid": 0.5, "kid_std": 0.125}}
    clip |= {"tuned": {"score": 29.25, "cmmd": 0.75, "kid": 0.25, "kid_std": math.nan}}
    return {
        "settings": {"lora_weights": "run", "prompt": HOSTILE, "variant": None},
        "notes": [f"A note of {HOSTILE}"],
        "step": 40,
        "pictures": {"count": 60, "drawn": [], "judge": judge | {"content_kept": 0.5}, "clip": clip},
        "loss": loss_comparison.loss_figures(Rows, losses, points, 1000),
    }


def jpeg_of(color):
    return pages.as_jpeg(Image.new("RGB", (64, 48), color))


class Page(HTMLParser):
    """The texts and the tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.texts.append(text)


def test_the_page_holds_its_pictures_and_needs_nothing_else(figures):
    pairs = [Pair(Drawn(HOSTILE, 0, 3), jpeg_of("red"), jpeg_of("blue"))]
    page = Page(evaluation_page.as_page(figures, pairs, [jpeg_of("green"), jpeg_of("white")]))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    found = []
    for image in images:
        kind, content = image["src"].split(",")
        assert kind == "data:image/jpeg;base64"
        opened = Image.open(io.BytesIO(base64.b64decode(content)))
        assert (image["width"], image["height"]) == ("64", "48")
        found.append(opened.convert("RGB").getpixel((30, 20)))
    expected = [(255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 255, 255)]  # base before tuned
    for color, known in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(color, known, strict=True)) < 8
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "b"} == {"b"}
    assert not [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("href", "onload")
    ]
    assert not [a["src"] for _, a in page.tags if "src" in a and not a["src"].startswith("data:")]


def test_what_comes_from_users_is_text_on_the_page(figures):
    text = evaluation_page.as_page(
        figures, [Pair(Drawn(HOSTILE, 0, 3), jpeg_of("red"), jpeg_of("blue"))], [jpeg_of("red")]
    )
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") >= 4  # caption, prompt, note, setting
    assert "<b>one" not in text
    assert "猫" in text


def test_the_page_says_the_figures(figures):
    text = " ".join(Page(evaluation_page.as_page(figures, [], []).partition("</style>")[2]).texts)
    for said in ("1.3000", "1.0500", "-19.2 %", "95.0 %", "content kept", "50.0 %", "30.50", "0.750", "0.9500"):
        assert said in text, said
    assert "overfitting starts there" in text
    assert "variant" not in text


def test_the_terminal_says_the_figures(figures):
    text = evaluation_page.as_text(figures)
    assert re.search(r"^Loss of 2 held-out pictures +base +tuned +change$", text, re.MULTILINE)
    assert re.search(r"^  all timesteps +1\.3000 +1\.0500 +-19\.2 % ± 3\.8$", text, re.MULTILINE)
    assert re.search(r"^  250-499 +1\.3000 +1\.0500 +-19\.2 %$", text, re.MULTILINE)
    assert re.search(r"^  in the style +10\.0 % +95\.0 %$", text, re.MULTILINE)
    assert re.search(r"^  in the style, seed 7 +15\.0 % +100\.0 %$", text, re.MULTILINE)
    assert re.search(r"^  20 +0\.9500 +1\.0000$", text, re.MULTILINE)
    assert "\x1b" not in text
    assert "On held-out pictures the loss changes by -19.2 %, on pictures trained on by -45.8 %." in text


def test_a_change_within_two_errors_is_called_chance(figures):
    figures["loss"]["held_out"] |= {"change": -0.01, "error": 0.006}
    assert "the loss changes by -1.0 %, which so few pictures do not tell from chance" in evaluation_page.as_text(
        figures
    )
    figures["loss"]["held_out"] |= {"pictures": 1, "error": math.nan}
    assert "the loss changes by -1.0 %, which a single picture does not tell from chance" in evaluation_page.as_text(
        figures
    )
    figures["loss"]["held_out"] |= {"change": math.nan}
    assert "The tuned model's loss is not finite" in evaluation_page.as_text(figures)


def test_kid_has_its_deviation_and_few_pictures_a_caveat(figures):
    text = evaluation_page.as_text(figures)
    assert re.search(r"^  KID x 1000 .* 500\.000 ± 125\.000 +250\.000$", text, re.MULTILINE)
    assert "KID and CMMD are of 60 pictures and 9 of the data: of fewer than 100, chance weighs much in both" in text
    figures["pictures"]["count"] = figures["pictures"]["clip"]["reference_pictures"] = 100
    assert "chance weighs" not in evaluation_page.as_text(figures)


def test_where_nothing_says_what_was_trained_on_there_is_no_column_of_it(figures):
    figures["loss"]["trained"] = None
    for point in figures["loss"]["curve"]["points"]:
        point["trained"] = math.nan
    figures["loss"]["curve"]["verdict"] = ""
    page = evaluation_page.as_page(figures, [], []).partition("</style>")[2]
    for text in (evaluation_page.as_text(figures), page):
        assert "trained" not in text
    assert re.search(r"^  20 +0\.9500$", evaluation_page.as_text(figures), re.MULTILINE)
    assert not re.search(r'<polyline class="line second"', page)


def test_without_scores_trained_pictures_and_checkpoints_there_are_the_losses(figures):
    figures["pictures"] = {"count": 0, "drawn": []}
    figures["loss"] |= {"trained": None, "curve": None}
    assert "judge" not in evaluation_page.as_text(figures)
    assert "svg" not in {tag for tag, _ in Page(evaluation_page.as_page(figures, [], [])).tags}


# --- TensorBoard ---


def test_the_scalars_can_be_read_and_take_the_place_of_older_ones(figures, tmp_path):
    folder = tmp_path / "tensorboard"
    evaluation_page.write_scalars(folder, figures | {"loss": figures["loss"] | {"curve": None}}, 99)
    (folder / "mine.txt").write_text("precious")
    evaluation_page.write_scalars(folder, figures, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    assert len(list(folder.iterdir())) == 2
    assert (folder / "mine.txt").read_text() == "precious"
    log = EventAccumulator(str(folder))
    log.Reload()
    read = lambda name: {e.step: round(e.value, 4) for e in log.Scalars(f"evaluation/{name}")}  # noqa: E731
    assert read("validation_loss/tuned") == {0: 1.3, 20: 0.95, 40: 1.05}
    assert read("validation_loss/base") == {0: 1.3, 20: 1.3, 40: 1.3}
    assert read("trained_loss/tuned") == {0: 1.2, 20: 1.0, 40: 0.65}
    assert (read("style_score/base"), read("style_score/tuned")) == ({40: 0.1}, {40: 0.95})
    assert (read("clip_score/tuned"), read("cmmd/tuned"), read("kid/base")) == ({40: 29.25}, {40: 0.75}, {40: 0.5})


# --- JSON ---


def test_json_has_no_word_for_what_is_not_finite():
    figures = {"a": math.nan, 1: [math.inf, 0.5, ("x", -math.inf)], "b": {"c": True, "d": None}}
    written = evaluation_page.as_json(figures)
    assert written == {"a": None, "1": [None, 0.5, ["x", None]], "b": {"c": True, "d": None}}
    assert json.loads(json.dumps(written, allow_nan=False)) == written

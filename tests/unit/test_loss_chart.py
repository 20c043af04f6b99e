import math
import re

import pytest

from rasengan import loss_chart


def points_of(text, kind):
    line = re.search(rf'<polyline class="line {kind}" points="([^"]*)"', text)[1]
    return [tuple(map(float, pair.split(","))) for pair in line.split()]


def test_the_chart_shows_each_loss_at_its_step():
    points = [(0, 1.3, 1.2), (20, 0.95, 1.0), (40, 1.05, 0.65)]
    points = [{"step": step, "held_out": held_out, "trained": trained} for step, held_out, trained in points]
    text = loss_chart.chart({"lowest_step": 20, "verdict": "", "points": points})
    held_out, trained = points_of(text, "first"), points_of(text, "second")
    (x0, y0), (x20, y20), (x40, y40) = held_out
    assert x20 - x0 == pytest.approx(x40 - x20, abs=0.2)  # steps 0, 20, 40
    # Losses 1.30, 0.95 and 1.05, downwards.
    assert (y20 - y0) / (y20 - y40) == pytest.approx(3.5, rel=0.02)
    assert trained[2][1] > max(y0, y20, y40)  # 0.65
    (lowest,) = re.findall(r'<circle class="first" cx="([\d.]+)" cy="([\d.]+)" r="5">', text)
    assert tuple(map(float, lowest)) == (x20, y20)


def test_what_is_not_finite_is_left_out_of_the_chart():
    curve = {"lowest_step": 1, "verdict": "", "points": []}
    for step, value in enumerate((1.0, 0.5, math.nan, math.inf)):
        curve["points"].append({"step": step, "held_out": value, "trained": math.nan})
    text = loss_chart.chart(curve)
    assert len(points_of(text, "first")) == 2
    assert 'class="line second"' not in text
    assert "nan" not in text
    curve["points"] = [{"step": 0, "held_out": math.nan, "trained": math.nan}]
    assert loss_chart.chart(curve) == "<p>No loss is finite.</p>"


@pytest.mark.parametrize(
    ("low", "high", "least", "expected"),
    [
        (0, 3000, 1, [0, 1000, 2000, 3000]),
        (0, 60, 1, [0, 20, 40, 60]),
        (0, 2, 1, [0, 1, 2]),
        (0, 1, 1, [0, 1]),
        (0.152, 0.161, 1e-6, [0.152, 0.154, 0.156, 0.158, 0.16, 0.162]),
        (0.4, 0.4, 1e-6, [0.4, 0.400001]),
    ],
)
def test_axes_have_round_numbers_around_what_they_show(low, high, least, expected):
    assert loss_chart._ticks(low, high, least) == pytest.approx(expected, rel=1e-9)

import math
import re
import statistics

import pytest
import torch

from rasengan import loss_comparison
from rasengan.imaging import Picture
from rasengan.loss_comparison import Losses, Point


PICTURES = [Picture(f"{n}.png", f"digest {n}", 64, 64, None, n) for n in range(50)]


def losses_of(*means, spread=0.0):
    """Losses (pictures, 4) whose bands differ, of these means."""
    return torch.tensor([[mean - spread, mean, mean, mean + spread] for mean in means], dtype=torch.float64)


def test_a_comparison_is_of_the_same_picture_before_and_after():
    base, tuned = [1.0, 3.0, 2.0, 6.0], [0.9, 2.5, 2.1, 5.0]
    found = loss_comparison.compare(losses_of(*base, spread=0.5), losses_of(*tuned, spread=0.1), 1000)
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    assert found["pictures"] == 4
    assert found["change"] == pytest.approx(statistics.mean(differences) / 3.0)
    assert found["error"] == pytest.approx(statistics.stdev(differences) / 2 / 3.0)
    assert found["base"]["validation_loss"] == pytest.approx(3.0)
    assert found["base"]["validation_loss/t0-249"] == pytest.approx(2.5)
    assert found["tuned"]["validation_loss/t750-999"] == pytest.approx(2.625 + 0.1)
    assert math.isnan(loss_comparison.compare(losses_of(1.0), losses_of(0.9), 1000)["error"])


class Rows:
    """What is looked at of samples: of every other picture."""

    pictures, captions, rows = PICTURES, [[f"caption {n}"] for n in range(50)], [2, 4, 6]


def test_each_picture_has_its_losses_and_the_most_improved_comes_first():
    base, tuned = losses_of(1.0, 2.0, 3.0, spread=0.1), losses_of(math.nan, 1.0, 2.7)
    found = loss_comparison.each_picture(Rows, base, tuned)
    assert [about["row"] for about in found] == [4, 6, 2]
    assert found[0] == {
        "row": 4,
        "name": "4.png",
        "captions": ["caption 4"],
        "base": pytest.approx(2.0),
        "tuned": pytest.approx(1.0),
        "change": pytest.approx(-0.5),
        "base_bands": pytest.approx([1.9, 2.0, 2.0, 2.1]),
        "tuned_bands": [1.0] * 4,
    }


def test_without_trained_pictures_or_checkpoints_these_figures_are_left_out():
    none = torch.zeros(0, 4, dtype=torch.float64)
    losses = {"base": Losses(losses_of(1, 2, 3), none), "tuned": Losses(losses_of(0.9, 1.8, 2.7), none)}
    points = [Point(9, losses["tuned"]), Point(0, losses["base"])]
    found = loss_comparison.loss_figures(Rows, losses, points, 1000)
    assert (found["trained"], found["curve"]) == (None, None)
    found = loss_comparison.loss_figures(Rows, losses, [*points, Point(4, losses["base"])], 1000)
    assert [point["step"] for point in found["curve"]["points"]] == [0, 4, 9]
    assert found["curve"]["lowest_step"] == 9


def curve_of(*rows, trained=(1.0, 1.0, 1.0)):
    """The curve of a run whose held-out pictures had these losses after 0, 10, 20, ... steps."""
    of_trained = losses_of(*(0.5 * value for value in trained))
    return loss_comparison.curve([Point(10 * n, Losses(losses_of(*row), of_trained)) for n, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("rows", "lowest", "rises", "said"),
    [
        ([(1.0, 1.2, 1.4), (0.9, 1.1, 1.2), (0.8, 1.0, 1.1)], 20, False, "at the last step, 20: no overfitting"),
        (
            [(1.0, 1.2, 1.4), (0.8, 1.0, 1.2), (0.9, 1.11, 1.29)],
            10,
            True,
            r"lowest after step 10, and \+10\.0 % from there after step 20: overfitting starts there\. Meanwhile that",
        ),
        (
            [(1.0, 1.2, 1.4), (0.8, 1.0, 1.2), (0.7, 1.4, 1.2)],
            10,
            False,
            r"lowest after step 10, and \+10\.0 % .* step 20, which so few pictures do not tell from chance",
        ),
        (
            [(1.0, 1.2, 1.4), (1.1, 1.3, 1.5), (1.2, 1.41, 1.6)],
            0,
            True,
            "lowest without the adapter, .*: overfitting starts at once",
        ),
        ([(1.0, 1.2, 1.4), (0.9, 1.1, 1.3), (math.nan, 1, 1)], 10, False, "not finite after step 20: .* diverged"),
        ([(math.nan, 1, 1), (math.nan, 1, 1)], None, False, "No loss is finite"),
        ([(1.0,), (0.9,), (0.95,)], 10, False, "do not tell from chance"),
        (
            [(1.0,), (0.9,), (0.8,)],
            20,
            False,
            r"at the last step, 20, but of a single picture, which does not tell it from chance\. Measured",
        ),
    ],
    ids=["falls", "rises", "by chance", "at once", "diverged", "never finite", "one picture", "one that falls"],
)  # fmt: skip
def test_the_curve_says_where_overfitting_starts(rows, lowest, rises, said):
    found = curve_of(*rows)
    assert (found["lowest_step"], found["rises"]) == (lowest, rises)
    assert len(found["points"]) == len(rows)
    assert re.search(said, found["verdict"]), found["verdict"]


def sparse_curve(steps, held_out, **options):
    """The curve of three pictures' mean losses after these steps."""
    points = [
        Point(step, Losses(losses_of(mean - 0.2, mean, mean + 0.21), torch.zeros(0, 4)))
        for step, mean in zip(steps, held_out, strict=True)
    ]
    return loss_comparison.curve(points, **options)["verdict"]


def test_where_most_steps_were_not_measured_it_is_not_said_that_no_overfitting_is_seen():
    """What two checkpoints at the end leave of a run, which may have overfitted long before."""
    steps, means = [0, 2750, 3000], [1.0, 0.9, 0.8]
    verdict = sparse_curve(steps, means)
    assert "no overfitting" not in verdict
    assert re.search(r"lowest at the last step, 3000, of those measured\. Measured were the base and 2 steps", verdict)
    assert re.search(
        r"from 2750 to 3000, but none between 0 and 2750, where .* --checkpoints_total_limit.* --save_best", verdict
    )
    verdict = sparse_curve(steps, [1.0, 0.9, 0.99])
    assert re.search(
        r"lowest after step 2750, .* from there after step 3000: overfitting is seen\. Measured were", verdict
    )
    verdict = sparse_curve([0, *range(500, 3001, 500)], [1.0, 0.95, 0.93, 0.9, 0.88, 0.86, 0.8])
    assert re.search(r"3000: no overfitting is seen\. Measured were the base and 6 steps from 500 to 3000\.$", verdict)


def test_the_step_of_the_lowest_loss_in_training_stands_for_those_that_training_measured():
    verdict = sparse_curve([0, 500, 2750, 3000], [1.0, 0.7, 0.9, 0.8], best_step=500)
    assert re.search(r"lowest after step 500, .*: overfitting starts there\.", verdict)
    assert verdict.endswith("3 steps from 500 to 3000, that of the lowest loss in training, 500, among them.")
    said = r"at the last step, 3000: no overfitting is seen\. .* the lowest loss in training, 3000, among them\.$"
    assert re.search(said, sparse_curve([0, 2750, 3000], [1.0, 0.9, 0.8], best_step=3000))
    assert "none between 0 and 2750" in sparse_curve([0, 2750, 3000], [1.0, 0.9, 0.8], best_step=500)


def test_it_is_said_why_there_is_no_curve():
    none = torch.zeros(0, 4, dtype=torch.float64)
    points = [Point(step, Losses(losses_of(1.0), none)) for step in (0, 3000)]
    said = loss_comparison.no_curve(points)
    assert "--checkpoints: there is no curve, since no step but 3000 is left to measure" in said
    assert "--checkpoints_total_limit" in said
    assert "--save_best" in said
    assert "no step is left to measure" in loss_comparison.no_curve(points[:1])


def test_where_what_was_trained_on_rises_too_the_run_went_wrong():
    held_out, trained = [(1.0, 1.2, 1.4), (2.0, 2.3, 2.6)], [(1.1, 1.2, 1.3), (1.9, 2.1, 2.2)]
    points = [
        Point(10 * n, Losses(losses_of(*a), losses_of(*b)))
        for n, (a, b) in enumerate(zip(held_out, trained, strict=True))
    ]
    verdict = loss_comparison.curve(points)["verdict"]
    assert re.search(
        r"lowest without the adapter, .* the run went wrong, since .* too, by \+\d+\.\d %\. Lower", verdict
    )
    assert "overfitting" not in verdict

import math

import pytest
import torch

from rasengan.progress import STUCK, Progress


def read(progress, rows):
    for loss, norm in rows:
        progress.add(torch.tensor(loss), torch.tensor(norm))
    return progress.read()


def test_each_step_is_read_and_the_last_one_has_the_rates():
    progress = Progress(10, 4, torch.device("cpu"))
    found = read(progress, [(1.0, 2.0), (0.5, 3.0)])
    assert [found[step]["train_loss"] for step in (11, 12)] == [1.0, 0.5]
    assert [found[step]["grad_norm"] for step in (11, 12)] == [2.0, 3.0]
    assert "images_per_second" not in found[11]
    assert found[12]["images_per_second"] > 0
    assert read(progress, [(0.25, 1.0)]).keys() == {13}


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    progress = Progress(0, 1, torch.device("cpu"))
    read(progress, [(1.0, math.inf), (1.0, 1.0), (1.0, math.nan), (1.0, math.inf)])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 2)
    read(progress, [(1.0, 1.0)])
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 0)


def test_before_the_first_step_nothing_is_doubtful():
    for skipped in (None, {"skipped_steps": 7, "skipped_in_a_row": 0}):
        progress = Progress(4, 1, torch.device("cpu"), skipped)
        assert not progress.is_doubtful()
        assert not progress.is_stuck()
    assert Progress(4, 1, torch.device("cpu"), {"skipped_in_a_row": 5}).is_doubtful()


def test_what_a_checkpoint_kept_is_counted_on():
    before = Progress(0, 1, torch.device("cpu"))
    read(before, [(1.0, math.inf), (1.0, 1.0), (1.0, math.inf), (1.0, math.inf)])
    assert before.is_doubtful()
    after = Progress(4, 1, torch.device("cpu"), before.kept())
    assert read(after, [(1.0, math.inf)])[5]["skipped_steps"] == 4
    assert after.skipped_in_a_row == 3
    read(after, [(1.0, 1.0)])
    assert (after.skipped_in_a_row, after.is_doubtful()) == (0, False)
    read(after, [(math.nan, 1.0)])
    assert after.is_doubtful()


@pytest.mark.parametrize(
    ("rows", "is_stuck"),
    [
        ([(1.0, 1.0)] + [(math.nan, math.nan)] * (STUCK - 1), False),  # one step's samples may be at fault
        ([(math.nan, math.nan)] * (STUCK - 1), True),  # but not those of all that there were
        ([(math.nan, math.nan)] * STUCK, True),
        ([(1.0, math.inf)] * STUCK, False),  # how the gradient scaler finds its scale
        ([(math.nan, math.nan)] * STUCK + [(1.0, 1.0)], False),
    ],
)
def test_a_run_is_stuck_where_several_losses_are_not_finite(rows, is_stuck):
    progress = Progress(0, 1, torch.device("cpu"))
    read(progress, rows)
    assert progress.is_stuck() == is_stuck


def test_a_pause_does_not_count_for_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(0, 4, torch.device("cpu"))
    now[0] = 1.0
    with progress.paused():
        now[0] = 101.0
    now[0] = 102.0
    assert read(progress, [(1.0, 1.0)])[1]["images_per_second"] == pytest.approx(2.0)


def test_the_steps_that_are_done_count_read_or_not():
    progress = Progress(10, 4, torch.device("cpu"), {"samples_seen": 70})  # of which some were with another batch
    assert (progress.steps(), progress.kept()["samples_seen"]) == (10, 70)
    progress.add(torch.tensor(1.0), torch.tensor(1.0))
    assert (progress.steps(), progress.kept()["samples_seen"]) == (11, 74)
    read(progress, [(1.0, 1.0), (1.0, math.inf)])
    assert progress.steps() == 13
    assert progress.kept() == {"samples_seen": 82, "skipped_steps": 1, "skipped_in_a_row": 1}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([(1.0, 1.0)], []),
        ([(1.0, math.inf), (1.0, 1.0)], ["1 steps were skipped, because their gradients were not finite"]),
        (
            [(1.0, math.inf), (1.0, 1.0), (1.0, math.inf)],
            [
                "2 steps were skipped, because their gradients were not finite, of which 1 are the last: compare "
                "checkpoints"
            ],
        ),
    ],
)
def test_skipped_steps_are_warned_of(rows, said, caplog):
    progress = Progress(0, 1, torch.device("cpu"))
    read(progress, rows)
    progress.warn_of_skipped()
    assert [record.getMessage() for record in caplog.records] == said

"""What the benchmarks make of two whole runs."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("measure")


def whole_run(start_s, steps, step_s, end_s=3.0):
    """Return what is kept of a run whose first step ends with its start."""
    wall_s = start_s + (steps - 1) * step_s + end_s
    return {"wall_s": wall_s, "first_step_s": start_s, "steps": steps, "step_ms_median": 1e3 * step_s}


@pytest.mark.parametrize("start_s", [9.0, 14.0])
def test_a_step_from_outside_does_not_hang_on_the_starts(measure, start_s):
    assert measure.outside_ms(whole_run(10.0, 12, 0.1), whole_run(start_s, 112, 0.1)) == pytest.approx(100)


def test_a_step_that_takes_less_from_outside_than_inside_is_none(measure):
    short = whole_run(10.0, 12, 0.1, end_s=3.3)
    assert measure.outside_ms(short, whole_run(10.0, 112, 0.1)) is None
    assert measure.outside_ms(short, whole_run(10.0, 312, 0.1)) == pytest.approx(99)


def test_runs_without_a_first_step_tell_nothing(measure):
    failed = {"exit_code": 1, "wall_s": 3.0, "steps": 12}
    assert measure.outside_ms(failed, whole_run(10.0, 112, 0.1)) is None

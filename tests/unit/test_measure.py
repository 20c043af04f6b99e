"""What the benchmarks make of whole runs, and of files of results."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from rasengan import UserError


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


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\x89PNG", None])
def test_a_file_that_holds_no_results_is_refused(measure, tmp_path, content):
    file = tmp_path / "results.json"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} "):
        measure.read_results(file)
    with pytest.raises(UserError, match=f"{file} "):
        measure.Results(file, "commit", {})


def test_a_start_that_failed_is_no_time(measure, tmp_path, monkeypatch, capsys):
    table, file = importlib.import_module("table"), tmp_path / "results.json"
    results = measure.Results(file, "commit", {})
    names = {"case": "start", "program": "ours", "variant": "second start"}
    results.keep(names, {"exit_code": 2, "wall_s": 5.2, "error": "error: no base"})
    results.keep(names | {"variant": "third start"}, {"exit_code": 0, "wall_s": 9.1, "first_step_s": 7.25})
    results.keep(names | {"program": "libraries"}, {"exit_code": 0, "wall_s": 4.0})
    monkeypatch.setattr(sys, "argv", ["table.py", str(file)])
    table.main()
    said = capsys.readouterr().out
    assert "| ours | second start | failed: error: no base |" in said
    assert "| third start | 7.2 |" in said
    assert "| libraries | second start | 4.0 |" in said
    file.write_text(json.dumps(json.loads(file.read_text()) | {"runs": []}))
    with pytest.raises(UserError, match="holds nothing that train_step.py or memory.py found"):
        table.main()


def test_runs_that_failed_or_were_none_are_an_error_in_the_end(measure, tmp_path):
    programs = importlib.import_module("programs")
    bench = programs.Bench(tmp_path, tmp_path / "logs", None, tiny=True)
    with pytest.raises(UserError, match="There was nothing to run"):
        bench.end()
    case = programs.Case(64, 1)
    bench.run("ours", case, 2, [])  # whose inputs are not there
    with pytest.raises(UserError, match=r"1 of 1 runs failed. See 001-ours.*\.log in .*logs"):
        bench.end()

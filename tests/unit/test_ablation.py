"""The table of benchmarks/ablation.py, from results as they are kept; a whole run takes hours on a CPU."""

import importlib
import json
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("ablation")


def result(setting, value, seed, style, content, loss_change=-0.5):
    shares = {"style": style, "content": content, "style_of_base": 0.0, "content_of_base": 0.9}
    return {"setting": setting, "value": value, "seed": seed, "loss_change": loss_change} | shares


def test_each_row_is_the_mean_of_the_newest_run_of_each_seed(ablation):
    runs = [
        result("recipe", "recipe", 0, 0.1, 0.1),
        result("rank", "4", 0, 0.5, 0.75),
        result("recipe", "recipe", 0, 0.9, 0.8),
        result("recipe", "recipe", 1, 1.0, 1.0),
    ]
    rows = ablation.table(runs).splitlines()[2:]
    assert rows == [
        "| the base, untrained | 0.0 % | 90.0 % |  |",
        "| recipe | 95.0 % | 90.0 % | -50.0 % |",
        "| `--rank 4` | 50.0 % | 75.0 % | -50.0 % |",
    ]


def test_a_seed_that_diverged_is_said(ablation):
    diverged = result("rank", "64", 1, 0.0, 0.0, None) | {"style_of_base": None, "content_of_base": None}
    (row,) = ablation.table([result("rank", "64", 0, 0.5, 0.5), diverged]).splitlines()[2:]
    assert row == "| `--rank 64` | 25.0 % | 25.0 % | diverged |"


def test_alpha_stays_twice_the_rank_and_each_case_changes_one_setting_else(ablation):
    flags = {(setting, value): words for setting, value, words in ablation.cases()}
    assert flags["recipe", "recipe"] == []
    assert flags["rank", "8"] == ["--rank", "8", "--lora_alpha", "16"]
    assert flags["learning_rate", "1e-3"] == ["--learning_rate", "1e-3"]
    assert {("rank", "16"), ("lora_alpha", "32"), ("learning_rate", "2e-3")}.isdisjoint(flags)


def test_the_table_in_the_docs_is_that_of_the_kept_results(ablation):
    kept = json.loads((ROOT / "benchmarks" / "results" / "ablation_gpu.json").read_text())
    docs = (ROOT / "docs" / "miniature.md").read_text()
    rows = ablation.table(kept["runs"]).splitlines()
    assert {row for row in rows if row.startswith("| `--")} <= set(docs.splitlines())
    assert {run["seed"] for run in kept["runs"]} == {0, 1, 2}

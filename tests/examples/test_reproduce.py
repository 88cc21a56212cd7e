"""The short form of examples/reproduce: one task and one seed, and the results that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from esft.comparison.records import read_comparison
from esft.comparison.runs import Planner
from esft.comparison.spec import as_compare_recipe
from tests.command import ROOT, python_process

FOLDER = ROOT / "examples" / "reproduce"


@pytest.mark.slow
def test_the_short_form_compares_and_reports(tmp_path: Path) -> None:
    done = python_process(FOLDER / "reproduce.py", "--short", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = read_comparison(tmp_path / "out")
    assert [run.method for run in found.records] == ["esft-token", "random", "lora", "full"]
    base = found.base["dates"]
    for run in found.records:
        assert run.outcome is not None, run.error
        assert run.outcome.loss < base.loss  # it has begun to learn
    trained = {run.method: run.outcome.trained for run in found.records if run.outcome}
    assert trained["esft-token"] < trained["lora"] < trained["full"]
    assert "esft-token" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["compare", "why"])
def test_the_kept_results_are_those_of_the_whole_recipe(name: str) -> None:
    planner = Planner(as_compare_recipe(FOLDER / f"{name}.yaml"))
    found = read_comparison(FOLDER / "results" / name)
    assert (found.tasks, found.methods) == (planner.tasks, planner.methods)
    for task in planner.tasks:
        for method in planner.methods:
            assert [run.seed for run in found.of(task, method)] == planner.seeds, (task, method)
            grid = {run.folder for run in planner.grid(task, method)}
            assert grid <= {run.folder for run in found.records}

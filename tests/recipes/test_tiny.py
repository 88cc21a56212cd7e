"""The recipes for the tiny model run as they are, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import esft
from esft.recipe import read_recipe
from esft.shipped import ShippedRecipe, list_recipes

TINY = [r for r in list_recipes() if r.model == "tiny-moe" and r.command == "train"]

# Scoring takes longer than three steps; what is scored is tests/run/'s.
FEWER_SCORES = [
    "training.eval_steps=3",
    "data.eval_rows=4",
    "evaluation.max_rows=4",
    "evaluation.general_max_rows=1",
]


@pytest.mark.parametrize("shipped", TINY, ids=lambda shipped: shipped.name)
def test_a_recipe_runs_and_learns(shipped: ShippedRecipe, tmp_path: Path) -> None:
    overrides = ["training.max_steps=3", "training.logging_steps=1", *FEWER_SCORES]
    if read_recipe(shipped.file).selection is not None:
        overrides.append("selection.tokens=1024")
    result = esft.train(read_recipe(shipped.file, overrides), tmp_path / "run")
    assert result.method == shipped.method
    losses = logged(tmp_path / "run")
    assert losses[-1] < losses[0]
    esft.verify("tiny-moe", result.delta)
    assert result.test is not None
    assert result.test.rows == 4
    assert result.general is not None
    assert len(result.general) == 8


def logged(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]

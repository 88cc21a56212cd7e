"""Batches of rows of like length: less padding, and the same order in a run that was resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import esft
from esft.data.packing import collate
from tests.checkpoints import save_tiny
from tests.resumed_runs import STEPS, cut_back, delta_bytes, logged, recipe

STRATEGY = {"train_sampling_strategy": "group_by_length"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


def write_rows(path: Path, rows: int) -> Path:
    """Write rows with 1 to 12 letters of completion."""
    made = [
        {"prompt": f"{n}:", "completion": "abcdefghijkl"[: 1 + n * 5 % 12]} for n in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


# Seven steps an epoch: in the first and in the second.
@pytest.mark.parametrize("step", [2, 8])
def test_a_resumed_run_sees_the_rows_in_the_same_order(
    base: Path, tmp_path: Path, step: int
) -> None:
    data = write_rows(tmp_path / "train.jsonl", 14)
    wanted = recipe(base, data, checkpoints={"keep_last": 99}, save_steps=1, **STRATEGY)
    run = tmp_path / "run"
    esft.train(wanted, run)
    expected, lines = delta_bytes(run), logged(run)
    cut_back(run, step)
    esft.train(wanted, run, resume=True)
    assert delta_bytes(run) == expected
    assert logged(run) == lines


def test_batches_have_little_padding(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "train.jsonl", 200)
    places: dict[str, list[int]] = {}

    def spied(items: Any, **options: Any) -> Any:
        batch = collate(items, **options)
        places[name].append(int((batch["attention_mask"] == 0).sum()))
        return batch

    monkeypatch.setattr("esft.training.collate", spied)
    for name, changes in (("shuffled", {}), ("grouped", STRATEGY)):
        places[name] = []
        esft.train(recipe(base, data, save_strategy="no", **changes), tmp_path / name)
        assert len(places[name]) >= STEPS
    assert sum(places["grouped"][:STEPS]) < sum(places["shuffled"][:STEPS]) / 3

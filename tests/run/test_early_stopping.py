"""Early stopping and the best step: where a run ends, resumed or not, and whose weights it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

import esft
from esft.run.checkpoint import last
from esft.run.early_stopping import without_gain
from tests.checkpoints import save_tiny


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=9),
    st.booleans(),
    st.sampled_from([0.0, 0.15, 0.4]),
)
def test_counts_as_transformers_callback(values: list[float], greater: bool, gain: float) -> None:
    class Arguments:
        metric_for_best_model = "eval_loss"
        greater_is_better = greater

    theirs = EarlyStoppingCallback(10, gain)
    state = TrainerState()
    for value in values:
        theirs.on_evaluate(Arguments(), state, TrainerControl(), {"eval_loss": value})  # type: ignore[arg-type]
        # The loop itself keeps the best, after the callback.
        best = state.best_metric
        if best is None or (value > best if greater else value < best):
            state.best_metric = value
    found = without_gain(values, greater_is_better=greater, threshold=gain)
    assert found == theirs.early_stopping_patience_counter


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that gets better and then much worse: its test rows contradict its training rows."""
    folder = tmp_path_factory.mktemp("early")
    base = save_tiny(folder / "base")
    for name, letters in (("train", "abababab"), ("eval", "abcdcdcd")):
        rows = [{"prompt": f"{n}:", "completion": letters[: 4 + n % 4]} for n in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": base,
        "selection": {"p": 0.5},
        "data": {
            "train": folder / "train.jsonl",
            "eval": folder / "eval.jsonl",
            "max_length": 16,
            "packing": False,
        },
        "training": {
            "max_steps": 40,
            "learning_rate": 5e-2,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
        },
        "early_stopping": {"patience": 3},
        "checkpoints": {"keep_last": 1},
    }


def scores(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_stops_and_keeps_the_best_step(setting: dict[str, Any], tmp_path: Path) -> None:
    result = esft.train(setting, tmp_path / "run")
    logged = scores(tmp_path / "run")
    best = min(logged, key=lambda step: logged[step])
    assert 2 < best < 34
    assert result.best_step == best
    assert result.steps == max(logged) == best + 6  # three evaluations without a gain
    assert result.evaluation is not None
    assert result.evaluation.loss == pytest.approx(logged[best], abs=1e-6)
    delta = load_file(tmp_path / "run" / "delta" / "esft_delta.safetensors")
    # A run that ends at the best step has the same weights.
    short = setting["training"] | {"max_steps": best, "load_best_model_at_end": False}
    esft.train(setting | {"training": short, "early_stopping": None}, tmp_path / "short")
    expected = load_file(tmp_path / "short" / "delta" / "esft_delta.safetensors")
    assert all(torch.equal(delta[name], expected[name]) for name in expected)
    assert f"the weights are those of step {best}" in (tmp_path / "run" / "README.md").read_text()


def test_a_resumed_run_stops_where_it_would_have(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = esft.train(setting, tmp_path / "whole")
    # Ended after the last step but before the delta: there is nothing left to train.
    kept = last(tmp_path / "whole" / "checkpoints")
    assert kept is not None
    assert kept.step == whole.steps
    original = (tmp_path / "whole" / "delta" / "esft_delta.safetensors").read_bytes()
    (tmp_path / "whole" / "delta").rename(tmp_path / "moved")
    again = esft.train(setting, tmp_path / "whole", resume=True)
    assert (again.steps, again.best_step) == (whole.steps, whole.best_step)
    assert (tmp_path / "whole" / "delta" / "esft_delta.safetensors").read_bytes() == original

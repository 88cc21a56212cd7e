"""Real steps, whole or of the first layers, and what they say of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import esft
from esft.errors import EsftError
from esft.plans import probe

RECIPE: dict[str, Any] = {
    "model": "tiny-moe",
    "device": "cpu",
    "selection": {"top_n": 2},
    "routing_drift": False,
    "data": {"train": "absent.jsonl", "max_length": 64},
    "training": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 10,
    },
}


def test_the_model_takes_steps() -> None:
    found = esft.plan(RECIPE, probe=True).probe
    assert found is not None
    assert found.layers == found.of_layers
    # An optimizer step of the run is four batches; what was timed is one.
    assert found.step_seconds == pytest.approx(4 * found.seconds)
    assert found.total_seconds == pytest.approx(10 * found.step_seconds)
    assert found.tokens_per_second == pytest.approx(4 * 64 / found.step_seconds)


def test_where_it_does_not_fit_the_first_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = esft.plan(RECIPE)
    assert whole.peak is not None
    monkeypatch.setattr(probe, "_free", lambda _device: 2 * (whole.peak - 1))
    found = esft.plan(RECIPE, probe=True).probe
    assert found is not None
    assert 0 < found.layers < found.of_layers
    assert found.step_seconds > 4 * found.seconds  # the other layers take their time, too
    monkeypatch.setattr(probe, "_free", lambda _device: 1000)
    with pytest.raises(EsftError, match="--probe"):
        esft.plan(RECIPE, probe=True)


def test_steps_are_taken_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EsftError, match="no GPU"):
        esft.plan(RECIPE | {"device": None}, device="cuda", probe=True)

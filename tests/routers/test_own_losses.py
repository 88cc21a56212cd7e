"""Losses that a checkpoint would add to its task's by itself are off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.nn.functional import cross_entropy

import esft
from esft.moe import moe_layers
from esft.routers.losses import silence_own_losses
from tests.models import tiny
from tests.models_of_ours import tiny_models as own_models
from tests.notes import Notes
from tests.router_runs import CHOSEN, first_loss, wanted
from tests.test_layouts import model_of
from tests.training_loop import batches

# The coefficient in the config of a family that has a loss of its own; Grok-1 is a model of esft.
OWN = {
    "mixtral": "router_aux_loss_coef",
    "qwen3_moe": "router_aux_loss_coef",
    "olmoe": "router_aux_loss_coef",
    "gpt_oss": "router_aux_loss_coef",
    "grok1": "router_aux_loss_coef",
}


def loss_and_plain(model: Any) -> tuple[float, float]:
    ids = batches(1)[0]
    out = model.train()(input_ids=ids, labels=ids, use_cache=False)
    plain = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return out.loss.item(), plain.item()


@pytest.mark.parametrize("family", OWN)
def test_a_model_s_own_loss_is_not_added(family: str) -> None:
    make: Callable[..., Any] = own_models.tiny if family == "grok1" else tiny
    # As a checkpoint comes: none, though it has a coefficient.
    weight = {OWN[family]: 100.0}
    found, plain = loss_and_plain(make(family, **weight))
    assert found == pytest.approx(plain, rel=1e-6)
    # And as some come: the loss would be added.
    notes = Notes()
    model = make(family, **weight, output_router_logits=True)
    found, plain = loss_and_plain(model)
    assert found > plain + 1
    silence_own_losses(model, notes)
    found, plain = loss_and_plain(model)
    assert found == pytest.approx(plain, rel=1e-6)
    assert len(notes.notes) == 1
    assert "output_router_logits" in notes.notes[0]


def test_the_loss_of_a_checkpoint_s_own_code_is_turned_off() -> None:
    model, notes = model_of("listed"), Notes()
    model.config.aux_loss_alpha = 0.001
    for layer in moe_layers(model):
        layer.router.alpha = 0.001  # type: ignore[union-attr, assignment]
    silence_own_losses(model, notes)
    assert all(layer.router.alpha == 0 for layer in moe_layers(model))  # type: ignore[union-attr]
    assert "aux_loss_alpha 0.001" in notes.notes[0]
    silence_own_losses(tiny("qwen3_moe"), notes)
    assert len(notes.notes) == 1


def test_a_run_of_a_checkpoint_with_its_own_loss(base: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 100.0}
    (other / "config.json").write_text(json.dumps(config))
    (tmp_path / "s.json").write_text(json.dumps(CHOSEN))
    for name, folder in (("plain", base), ("own", other)):
        made = wanted(folder, data, None, selection=tmp_path / "s.json", max_steps=1)
        esft.train(made, tmp_path / name)
    files = [tmp_path / n / "delta" / "esft_delta.safetensors" for n in ("plain", "own")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert first_loss(tmp_path / "plain") == first_loss(tmp_path / "own")

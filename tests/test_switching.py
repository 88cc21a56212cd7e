"""Deltas beside a loaded model: each computes what merging it gives, alone and row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esft.delta import attach_delta
from esft.errors import CheckError, DeltaError, ModelError
from esft.experts import attach
from esft.moe import moe_layers
from esft.selection import Selection
from esft.switching import active, disable, load_delta, set_active, unload_deltas
from tests.deltas import load, save_base, train_delta

FAMILIES = ("qwen3_moe", "gpt_oss")
# They share expert 5 of layer 1, where each has weights of its own.
PICKED = {"law": {1: [5, 0], 2: [3]}, "sql": {1: [5, 7]}}
IDS = torch.arange(5, 41).view(3, 12)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", request.param)
    for name, experts in PICKED.items():
        train_delta(base, root / name, experts)
    return {"base": base} | {name: root / name for name in PICKED}


def model_of(base: Path) -> Any:
    """In fp32, where the order of sums does not show."""
    return load(base).float()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def expected(made: dict[str, Path], name: str | None) -> torch.Tensor:
    """By writing the delta into the model's own weights: the oracle."""
    model = model_of(made["base"])
    model.set_experts_implementation("esft")
    return logits(model if name is None else attach_delta(model, made["base"], made[name]))


def with_deltas(made: dict[str, Path]) -> Any:
    model = model_of(made["base"])
    for name in PICKED:
        load_delta(model, made[name], base=made["base"])
    return model


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).norm() / wanted.norm() < 1e-5)


def test_each_delta_computes_what_writing_it_into_the_model_does(made):
    model = with_deltas(made)
    wanted = {name: expected(made, name) for name in (None, *PICKED)}
    assert not close(wanted["law"], wanted["sql"])
    assert not close(wanted["law"], wanted[None])
    for name in ("law", "sql", None, "law"):
        set_active(model, name)
        assert close(logits(model), wanted[name])


def test_a_batch_mixes_deltas_row_by_row(made):
    model = with_deltas(made)
    rows = ["sql", None, "law"]
    set_active(model, rows)
    found = logits(model)
    for row, name in enumerate(rows):
        assert close(found[row], expected(made, name)[row])


def test_generation_keeps_each_row_s_delta(made):
    """A step of generation has one token a row; beams multiply the rows."""
    model = with_deltas(made)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    alone = []
    for row, name in enumerate(("sql", "law", None)):
        with active(model, name):
            alone.append(model.generate(IDS[row : row + 1], **options))
    with active(model, ["sql", "law", None]):
        mixed = model.generate(IDS, **options)
    assert torch.equal(mixed, torch.cat(alone))


def test_the_model_s_own_weights_stay_where_they_are(made):
    model = model_of(made["base"])
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    untouched = logits(model)
    for name in PICKED:
        load_delta(model, made[name], base=made["base"])
    set_active(model, "law")
    logits(model)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == {
        n: place for n, (place, _) in before.items()
    }
    assert set(model.state_dict()) == set(model_of(made["base"]).state_dict())
    disable(model)
    assert torch.equal(logits(model), untouched)  # by the implementation that it had
    unload_deltas(model)
    assert all(torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert not any(hasattr(layer.experts, "esft_deltas") for layer in moe_layers(model))
    assert torch.equal(logits(model), untouched)


def test_only_the_deltas_experts_take_memory(made):
    model = with_deltas(made)
    for layer in moe_layers(model):
        picked = sum(len(experts.get(layer.index, [])) for experts in PICKED.values())
        stacks = dict(layer.experts.named_parameters(recurse=False))
        loaded = layer.experts.esft_deltas.stacks
        assert {name: stack.shape[0] for name, stack in loaded.items()} == dict.fromkeys(
            stacks, picked
        )


def test_refusals(made, tmp_path):
    model = model_of(made["base"])
    with pytest.raises(DeltaError, match="no delta is loaded; call load_delta first"):
        set_active(model, "law")
    load_delta(model, made["law"], "Law", base=made["base"])
    with pytest.raises(DeltaError, match='a delta called "Law" is loaded already'):
        load_delta(model, made["sql"], "Law", base=made["base"])
    with pytest.raises(DeltaError, match=r'no delta called "Lew" is loaded.*Law'):
        set_active(model, "Lew")
    with pytest.raises(DeltaError, match="no row"):
        set_active(model, [])
    set_active(model, ["Law"] * 5)
    with pytest.raises(DeltaError, match="named 5 rows, but the batch has 36 tokens"):
        logits(model)
    attached = attach(model_of(made["base"]), Selection(experts={1: [0]}))
    with pytest.raises(ModelError, match="has a selection attached; detach it"):
        load_delta(attached, made["law"], base=made["base"])
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(CheckError):
        load_delta(model_of(other), made["law"], base=other)

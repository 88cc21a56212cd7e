"""Families whose own code loops over experts: without content, against the same code with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import esft
from esft.plans.loops import answer_loops
from esft.plans.pretence import Tracker, pretending
from tests.models import VOCAB, tiny

B, S = 4, 64
SELECTION = esft.Selection({0: [1, 3], 2: [0]})
# An identity expert multiplies nothing: with some, operations would depend on the routing.
FAMILIES: dict[str, dict[str, Any]] = {
    "dbrx": {},
    "jetmoe": {},
    "longcat_flash": {"zero_expert_num": 0},
}


def step(model: Any, tracker: Tracker) -> tuple[int, int, int]:
    """Return the operations of a forward pass and of a step, and the most memory beside weights."""
    esft.attach(model, SELECTION)
    model.train()
    ids = (torch.arange(B * S) % VOCAB).view(B, S)  # each expert gets some
    tracker.reset()
    before = tracker.live
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    forward = tracker.flops
    loss.backward()
    return forward, tracker.flops, tracker.peak - before


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_and_memory_are_those_of_a_real_step(family: str) -> None:
    model = tiny(family, **FAMILIES[family])
    with Tracker() as tracker:
        forward, flops, peak = step(model, tracker)
    with pretending() as tracker:
        made = AutoModelForCausalLM.from_config(model.config)
        answer_loops(made, tracker)
        planned = step(made, tracker)
    assert not tracker.oracles
    assert planned[0] == forward
    # How many of the rows are the selected experts' is for the routing to say.
    assert planned[1] == pytest.approx(flops, rel=0.01)
    assert planned[2] == pytest.approx(peak, rel=0.1)


def test_identity_experts_take_rows_too() -> None:
    some, none = tiny("longcat_flash"), tiny("longcat_flash", zero_expert_num=0)
    with pretending() as tracker:
        made = AutoModelForCausalLM.from_config(some.config)
        answer_loops(made, tracker)
        flops = step(made, tracker)[0]
    with pretending() as tracker:
        made = AutoModelForCausalLM.from_config(none.config)
        answer_loops(made, tracker)
        assert flops < step(made, tracker)[0]


@pytest.mark.parametrize("method", ["esft", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_planned(family: str, method: str, tmp_path: Any) -> None:
    tiny(family).config.save_pretrained(tmp_path)
    data = {"train": "absent.jsonl", "max_length": 32, "packing": False}
    recipe = {"model": str(tmp_path), "method": method, "device": "cpu", "data": data}
    if method == "esft":
        recipe["selection"] = {"top_n": 2, "tokens": 64, "seq_len": 32}
    case = esft.plan(recipe | {"training": {"per_device_train_batch_size": 2}}).many
    assert case.obstacle is None
    assert case.flops
    assert case.memory.peak

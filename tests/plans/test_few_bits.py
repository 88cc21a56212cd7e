"""Frozen weights in few bits: what they take, against the run's own code on real tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import esft
from esft.plans.pretence import Tracker
from esft.plans.records import Plan
from esft.quantising.checkpoint import load_quantised
from esft.recipe_sections import FrozenSpec
from esft.trained_parts import TrainedParts
from tests.checkpoints import save_tiny

B, S = 2, 64
SELECTION = esft.Selection({1: [2, 4], 2: [0, 7]})
FAMILIES = ("qwen3_moe", "deepseek_v2", "gpt_oss")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", request.param)


def planned(base: Path, frozen: Any, folder: Path, **keys: Any) -> Plan:
    SELECTION.write(folder / "selection.json")
    data = {"train": "absent.jsonl", "max_length": S, "packing": False}
    recipe = {"model": str(base), "device": "cpu", "data": data, "frozen_dtype": frozen}
    recipe |= {"selection": str(folder / "selection.json"), "routing_drift": False}
    return esft.plan(recipe | {"training": {"per_device_train_batch_size": B}} | keys)


@pytest.mark.parametrize(
    "frozen", ["int8", "nf4", {"experts": "nf4", "linear": "int8", "embeddings": "int8"}]
)
def test_memory_is_that_of_a_real_step(base: Path, frozen: Any, tmp_path: Path) -> None:
    kinds = FrozenSpec(experts=frozen, linear=frozen) if isinstance(frozen, str) else None
    kinds = kinds or FrozenSpec(**frozen)
    with Tracker() as tracker:
        model = load_quantised(base, kinds.kinds, TrainedParts(), device="cpu", dtype="float32")
        esft.attach(model, SELECTION)
        weights = tracker.live
        model.train()
        ids = (torch.arange(B * S) % 200).view(B, S)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        tracker.reset()
        model(**inputs, use_cache=False).loss.backward()
        peak = tracker.peak
    memory = planned(base, frozen, tmp_path).many.memory
    assert memory.frozen + memory.trained == pytest.approx(weights, rel=0.02)
    assert memory.training is not None
    # The plan's is a later step, with the optimizer's state, and the run keeps a copy.
    step = memory.training - memory.optimizer - memory.start
    assert step == pytest.approx(peak, rel=0.1)


def test_experts_are_scored_before_anything_is_in_few_bits(base: Path, tmp_path: Path) -> None:
    rule = {"top_n": 2, "tokens": 4096, "seq_len": 64}
    found = planned(base, "nf4", tmp_path, selection=rule)
    assert found.many.memory.profiling == found.inference.profiling
    given = planned(base, "nf4", tmp_path)
    assert given.many.memory.profiling == 0
    whole = planned(base, None, tmp_path)
    for few, usual in ((given, whole), (found, planned(base, None, tmp_path, selection=rule))):
        assert few.many.memory.frozen < usual.many.memory.frozen
        assert few.many.trained == usual.many.trained


def test_bytes_by_hand(tmp_path: Path) -> None:
    H = I = 1024  # noqa: E741
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": H,
        "moe_intermediate_size": I,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "vocab_size": 1024,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole, int8, nf4 = (
        planned(tmp_path, kind, tmp_path, device="cuda").many.memory
        for kind in (None, "int8", "nf4")
    )
    experts = (3 * 64 - 4) * 3 * H * I
    attention = 3 * H * 128 * (8 + 2 + 2 + 8)
    for found, bits in ((int8, 8), (nf4, 4)):
        each = bits / 8 + 2 / 64  # a scale of 16 bits for a block of 64
        assert whole.frozen - found.frozen == (experts + attention) * (2 - each)

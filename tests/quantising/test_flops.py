"""A run's operations are the same, in however many bits its frozen weights are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from esft.experts import attach
from esft.loading import load_model
from esft.moe import moe_layers
from esft.quantising.checkpoint import load_quantised
from esft.run.flops import Work, training_flops
from esft.selection import Selection
from esft.trained_parts import TrainedParts
from tests.deltas import save_base

PICKED = {1: [5, 0], 2: [3]}
WORK = Work(tokens=1000, labelled=400, context=60, passes=3, recomputed=True)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_operations_do_not_depend_on_the_bits(tmp_path: Path, family: str) -> None:
    save_base(tmp_path, family)
    kinds = dict.fromkeys(("experts", "linear", "embeddings"), "nf4")
    counted = []
    for model in (load_model(tmp_path), load_quantised(tmp_path, kinds, TrainedParts())):
        layers = moe_layers(model)
        attach(model, Selection(experts=PICKED))
        counted.append(training_flops(model, layers, WORK, {1: 0.3, 2: 0.2}))
    assert counted[0] == counted[1] > 0

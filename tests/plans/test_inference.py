"""What a model needs when it does not train, against the commands' own code on real tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import esft
from esft.data.example import Example
from esft.errors import EsftError
from esft.evaluation import score_rows
from esft.moe import moe_layers
from esft.offload.split import split
from esft.plans.inference import Inference, Texts, rehearse_inference
from esft.plans.pretence import Tracker
from esft.profiling import profile_model
from tests.models import EXPERTS, HIDDEN, INNER, LAYERS, TOP_K, VOCAB, tiny

ROWS, LENGTH = 16, 128
TEXTS = Texts(profiled=(8, LENGTH), sample=ROWS * LENGTH, scored=(8, LENGTH), asked=LENGTH)
FAMILIES = ("qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss")


def planned(family: str, **overrides: Any) -> Inference:
    return rehearse_inference(tiny(family, **overrides).config, torch.float32, TEXTS)


def examples() -> list[Example]:
    ids = [(torch.arange(LENGTH) * (row + 1) % VOCAB).tolist() for row in range(ROWS)]
    return [Example(row, [True] * LENGTH, f"rows:{n}") for n, row in enumerate(ids)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_peaks_are_those_of_the_commands(family: str) -> None:
    vocabulary = {"vocab_size": 2048}  # large enough for logits to count
    prompt = torch.tensor([examples()[0].input_ids[:-1]])
    settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    with Tracker() as tracker:
        model = tiny(family, **vocabulary)
        weights = tracker.live

        def beside(run: Callable[[], object]) -> int:
            tracker.reset()
            run()
            return tracker.peak - weights

        profiled = beside(lambda: profile_model(model, examples(), batch_tokens=8 * LENGTH))
        scored = beside(lambda: score_rows(model, examples(), batch_tokens=8 * LENGTH))
        asked = beside(lambda: model.generate(input_ids=prompt, **settings))
    found = planned(family, **vocabulary)
    assert found.obstacle is None
    assert found.weights == weights
    assert found.profiling is not None
    assert found.evaluation is not None
    assert found.generation is not None
    # What a profile is summed up in is left out, and is not small beside a model this small.
    assert found.profiling - weights == pytest.approx(profiled, rel=0.2)
    inside = 4 * 1024 * 2048  # what logsumexp allocates, which is not seen
    assert found.evaluation - weights == pytest.approx(scored + inside, rel=0.1)
    assert found.generation - weights == pytest.approx(asked, rel=0.2)


def test_sizes_by_hand() -> None:
    found = planned("qwen3_moe")
    expert = 4 * 3 * HIDDEN * INNER
    assert found.experts == LAYERS * EXPERTS * expert
    heads = 2 * 16  # two heads of keys and of values
    assert found.cache == 2 * LAYERS * LENGTH * heads * 4
    assert found.hidden == 4 * ROWS * LENGTH * HIDDEN
    assert found.least == TOP_K * expert
    assert found.recommended == (TOP_K * LAYERS + 1 + 2) * expert
    assert found.generation is not None
    assert found.generation_least == found.generation - found.experts + found.least
    assert found.profiling is not None
    layer = EXPERTS * expert
    least = 2 * layer + found.hidden + found.profiling - found.weights
    assert found.streaming is not None
    assert least < found.streaming < least + layer  # attention, norms and the router of two


def test_a_plan_says_how_the_model_would_be_profiled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny("qwen3_moe").config.to_dict()))
    rule = {"top_n": 2, "tokens": 4096, "seq_len": 128}
    recipe = {"model": str(tmp_path), "device": "cpu", "selection": rule}
    recipe["data"] = {"train": "absent.jsonl", "max_length": 64}
    found = esft.plan(recipe).inference
    assert found.hidden == 4 * 4096 * HIDDEN
    for limit, streams in ((2 * found.weights, False), (found.weights, True)):
        fit = esft.plan(recipe, memory=limit).fit
        assert fit is not None
        assert fit.streams is streams


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_memory_is_what_the_commands_take(family: str) -> None:
    """The least is accepted, a byte less refused; the recommended keeps a token's experts."""
    found = planned(family)
    layers = moe_layers(tiny(family))
    experts = {layer.index: layer.num_experts for layer in layers}
    each = found.experts // sum(experts.values())

    def kept(budget: int) -> set[int]:
        return set(split(budget, experts=experts, expert_bytes=each, top_k=TOP_K).kept.values())

    assert kept(found.least)
    with pytest.raises(EsftError, match="too few"):
        kept(found.least - 1)
    assert kept(found.recommended) == {TOP_K}
    assert min(kept(found.recommended - 1)) < TOP_K

"""What `inspect` says of models, against their parameters' names; what it refuses, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from esft.errors import ModelError
from esft.moe import inspect, moe_layers
from tests.families import CONFIGS, small
from tests.models import EXPERTS, FAMILIES, HIDDEN, INNER, LAYERS, TOP_K, tiny

EVERY = tuple(range(LAYERS))
# Layers with routed experts, gate scale, steps of the router, shared experts a layer, as the
# families' papers and configurations say. `CONFIGS` asks for a scale of 2.5 where there is one.
ANATOMY: dict[str, tuple[tuple[int, ...], float, str, int]] = {
    "afmoe": ((1, 2), 2.5, "sigmoid, topk", 1),
    "deepseek_v2": ((1, 2), 2.5, "softmax, topk", 1),
    "deepseek_v3": ((1, 2), 2.5, "sigmoid, topk", 1),
    "dots1": ((1, 2), 2.5, "sigmoid, topk", 1),
    "ernie4_5_moe": ((1, 2), 1.0, "softmax, topk", 1),
    "glm4_moe": ((1, 2), 2.5, "sigmoid, topk", 1),
    "gpt_oss": (EVERY, 1.0, "topk, softmax", 0),
    "granitemoe": (EVERY, 1.0, "topk, softmax", 0),
    "granitemoeshared": (EVERY, 1.0, "topk, softmax", 1),
    "hunyuan_v1_moe": (EVERY, 1.0, "softmax, topk", 1),
    "jamba": ((1,), 1.0, "softmax, topk", 0),
    "minimax_m2": (EVERY, 1.0, "sigmoid, topk", 0),
    "mixtral": (EVERY, 1.0, "softmax, topk", 0),
    "nemotron_h": ((1, 2), 2.5, "sigmoid, topk", 1),
    "olmoe": (EVERY, 1.0, "softmax, topk", 0),
    "phimoe": (EVERY, 1.0, "sparsemixer", 0),
    "qwen2_moe": (EVERY, 1.0, "softmax, topk", 1),
    "qwen3_moe": (EVERY, 1.0, "softmax, topk", 0),
    "qwen3_next": (EVERY, 1.0, "softmax, topk", 1),
    "solar_open": (EVERY, 2.5, "sigmoid, topk", 1),
}


@pytest.mark.parametrize("family", ANATOMY)
def test_anatomy(family: str) -> None:
    indices, scale, scoring, shared = ANATOMY[family]
    layers = moe_layers(small(family))
    assert tuple(layer.index for layer in layers) == indices
    for layer in layers:
        assert (layer.num_experts, layer.top_k) == (EXPERTS, TOP_K)
        assert (layer.gate_scale, layer.scoring) == (scale, scoring)
        assert len(layer.shared) == shared
        assert f".{layer.index}." in layer.name


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "nemotron_h"])
def test_parameters_are_counted_by_name(family: str, tmp_path: Path) -> None:
    """The same from a model and from a configuration alone; tied weights counted once."""
    model = tiny(family)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = {name: size for name, size in sizes.items() if ".experts." in name}
    shared = {name: size for name, size in sizes.items() if ".shared_expert" in name}
    found = inspect(model)
    assert found.total == sum(sizes.values())
    assert found.routed == sum(routed.values())
    assert found.shared == sum(shared.values())
    assert found.routed == EXPERTS * found.per_expert * len(found.layers)
    matrices = {"nemotron_h": 2}.get(family, 3)
    biases = 2 * INNER + HIDDEN if family == "gpt_oss" else 0
    assert found.per_expert == matrices * HIDDEN * INNER + biases
    assert (found.model_type, found.architecture) == (family, type(model).__name__)
    model.config.save_pretrained(tmp_path)
    assert inspect(tmp_path).to_dict() == found.to_dict()


def test_tied_embeddings_are_counted_once() -> None:
    model = tiny("qwen3_moe", tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    assert inspect(model).total == inspect(tiny("qwen3_moe")).total - embedding.numel()


def test_layers_are_ordered_by_number() -> None:
    """Not by name, where 10 comes before 2, nor as the modules were registered."""
    model = tiny("mixtral", num_hidden_layers=12)
    blocks = model.model.layers
    blocks._modules = dict(reversed(blocks._modules.items()))
    assert [layer.index for layer in moe_layers(model)] == list(range(12))


# Families with routed experts that esft cannot train, with the least that their configuration
# needs to be small, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "doge": ({"is_moe": True, "num_experts": 16, "intermediate_size": 24}, "embedding rows"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_by_name(family: str, tmp_path: Path) -> None:
    own, reason = REFUSED[family]
    common = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    AutoConfig.for_model(family, **common | own).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path)
    assert str(caught.value).startswith(f"{family}: esft cannot train this family: ")
    assert reason in str(caught.value)


def test_a_family_of_the_future_that_counts_experts_is_not_called_dense() -> None:
    model = dense()
    model.config.num_experts = 8
    with pytest.raises(ModelError, match=r"llama: .* counts experts, but none of its modules"):
        inspect(model)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ModelError, match="llama: this model is dense"):
        inspect(dense())


def dense() -> nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return AutoModelForCausalLM.from_config(config)


def test_every_family_of_the_table_is_one_that_esft_accepts() -> None:
    assert set(ANATOMY) <= set(CONFIGS)
    assert not set(REFUSED) & set(CONFIGS)

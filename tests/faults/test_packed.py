"""N5: packed rows have the losses and gradients that they have alone, in eight architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from esft.data.example import IGNORED, Example
from esft.data.isolation import check_isolation
from esft.data.packing import TrainSet, collate, pack, separate
from tests.data.test_packing import EOS, documents
from tests.families import CONFIGS, SIZES

ARCHITECTURES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)
# One token, a block filled to its last place, rows shorter and longer than what is left.
LENGTHS = (7, 12, 3, 1, 20, 5, 9, 2, 24)


def build(architecture: str, attention: str) -> Any:
    sizes = SIZES | {"pad_token_id": 0} | CONFIGS[architecture]
    config = AutoConfig.for_model(architecture, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        ).eval()
        for parameter in model.parameters():
            # The default spread of 0.02 would hide what passes between rows.
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model


def losses(model: Any, batch: dict[str, Any]) -> Tensor:
    """The loss of each labelled token of a batch, in reading order."""
    arguments = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**arguments).logits[:, :-1]
    target = batch["labels"][:, 1:].flatten()
    each = cross_entropy(logits.flatten(0, 1), target, reduction="none", ignore_index=IGNORED)
    return each[target != IGNORED]


def learnt(model: Any, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """The labelled tokens' losses, and the gradient of their mean, of all parameters in one."""
    model.zero_grad()
    found = torch.cat([losses(model, batch) for batch in batches])
    found.mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach(), torch.cat(gradients)


def one_by_one(examples: list[Example]) -> list[dict[str, Any]]:
    """A batch for each row, made of nothing but its tokens."""
    return [
        {
            "input_ids": torch.tensor([example.input_ids]),
            "labels": torch.tensor([example.labels()]),
            "use_cache": False,
        }
        for example in examples
    ]


def batch_of(data: TrainSet) -> dict[str, Any]:
    return collate([data[i] for i in range(len(data))], pad_id=EOS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_n5_packed_rows_learn_what_they_learn_alone(architecture: str, attention: str) -> None:
    model = build(architecture, attention)
    assert model.config._attn_implementation == attention
    check_isolation(model)
    examples = documents(*LENGTHS)
    alone, gradient = learnt(model, one_by_one(examples))
    assert gradient.norm() > 1e-3
    packed = pack(examples, 24, pad_id=EOS)
    assert len(packed) < len(examples) - 3
    for data in (packed, separate(examples, 24)):
        together, its_gradient = learnt(model, [batch_of(data)])
        assert (together - alone).abs().max() <= 1e-5
        assert (its_gradient - gradient).abs().max() <= 1e-5


def test_the_comparison_sees_a_leak() -> None:
    model = build("qwen3_moe", "sdpa")
    examples = documents(*LENGTHS)
    alone, gradient = learnt(model, one_by_one(examples))
    batch = batch_of(pack(examples, 24, pad_id=EOS))
    del batch["position_ids"]
    leaky, its_gradient = learnt(model, [batch])
    assert (leaky - alone).abs().max() > 0.05
    assert (its_gradient - gradient).abs().max() > 1e-3

"""The routers' losses against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from esft.models.losses import load_balance_loss, router_z_loss

LAYERS, TOKENS, EXPERTS, TOP_K = 3, 14, 6, 2


def logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (TOKENS, EXPERTS)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]


COUNTED = [None, torch.tensor([[1, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]])]


def kept(counted: torch.Tensor | None) -> list[int]:
    return [t for t in range(TOKENS) if counted is None or counted.flatten()[t]]


@pytest.mark.parametrize("counted", COUNTED)
def test_z_loss(counted: torch.Tensor | None) -> None:
    total = 0.0
    for layer in logits():
        for token in kept(counted):
            total += math.log(sum(math.exp(z) for z in layer[token].tolist())) ** 2
    expected = total / len(kept(counted)) / LAYERS
    assert router_z_loss(logits(), counted).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counted", COUNTED)
def test_load_balance_loss(counted: torch.Tensor | None) -> None:
    total = 0.0
    for layer in logits():
        used, probability = [0.0] * EXPERTS, [0.0] * EXPERTS
        for token in kept(counted):
            z = layer[token].tolist()
            for expert in sorted(range(EXPERTS), key=lambda i, z=z: -z[i])[:TOP_K]:
                used[expert] += 1 / len(kept(counted))
            for expert in range(EXPERTS):
                share = math.exp(z[expert]) / sum(map(math.exp, z))
                probability[expert] += share / len(kept(counted))
        total += EXPERTS * sum(f * p for f, p in zip(used, probability, strict=True))
    found = load_balance_loss(logits(), TOP_K, counted)
    assert found.item() == pytest.approx(total / LAYERS, rel=1e-12)
    # transformers' own, of one layer (over several it pools before it multiplies).
    theirs = load_balancing_loss_func((logits()[0].float(),), EXPERTS, TOP_K, counted)
    assert load_balance_loss(logits()[:1], TOP_K, counted).item() == pytest.approx(
        theirs.item(), rel=1e-5
    )


def test_even_use_is_worth_k() -> None:
    """The least that even routing costs; one expert for all costs more."""
    even = torch.eye(EXPERTS, dtype=torch.float64) + torch.eye(EXPERTS, dtype=torch.float64).roll(
        1, 1
    )
    assert load_balance_loss([even], TOP_K).item() == pytest.approx(TOP_K)
    assert load_balance_loss([even[:1].expand(EXPERTS, -1)], TOP_K).item() > 1.2 * TOP_K


def test_losses_in_bf16_are_computed_in_fp32() -> None:
    wide = [x.bfloat16().float() for x in logits()]
    narrow = [x.bfloat16() for x in logits()]
    assert torch.equal(router_z_loss(narrow), router_z_loss(wide))
    assert torch.equal(load_balance_loss(narrow, TOP_K), load_balance_loss(wide, TOP_K))

"""OpenMoE against plain loops in float64: capacity, its order, and what is dropped."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from esft.data.example import Example
from esft.models.capacity import within_capacity
from esft.models.losses import load_balance_loss, router_z_loss
from esft.moe import moe_layers
from esft.profiling import profile_model
from tests.models_of_ours.tiny_models import EXPERTS, TOP_K, ids, wide


def plain_capacity(
    index: list[list[list[int]]], factor: float, minimum: int, real: list[list[bool]]
) -> list[list[list[bool]]]:
    """Queue at each expert, one choice at a time."""
    kept = []
    for row, counts in zip(index, real, strict=True):
        n, K = sum(counts), len(row[0])
        room = max(minimum, math.ceil(round(factor * K * n / EXPERTS, 9)))
        taken = [0] * EXPERTS
        result = [[False] * K for _ in row]
        for choice in range(K):
            for token, experts in enumerate(row):
                if counts[token] and taken[experts[choice]] < room:
                    taken[experts[choice]] += 1
                    result[token][choice] = True
        kept.append(result)
    return kept


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 1.25, 2.0, 8.0])
@pytest.mark.parametrize("minimum", [0, 1, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_is_the_plain_queue(factor: float, minimum: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(3, 20, EXPERTS, generator=generator).mul(
        torch.linspace(1, 3, EXPERTS)  # later experts are more wanted
    )
    index = index.topk(TOP_K, dim=-1).indices
    real = torch.ones(3, 20, dtype=torch.int64)
    if padded:
        real[0, 13:] = 0
        real[1, :7] = 0
    found = within_capacity(index, EXPERTS, factor, minimum, real if padded else None)
    expected = plain_capacity(index.tolist(), factor, minimum, real.bool().tolist())
    assert found.tolist() == expected
    assert found.all() == (factor == 8.0 and not padded)


@pytest.mark.parametrize("factor", ["0.7", "1.1", "1.25", "1.3", "2.2"])
def test_room_is_counted_in_decimals(factor: str) -> None:
    """All want one expert: as many are kept as it has room for, whatever binary fractions say."""
    for n in range(1, 120):
        found = within_capacity(torch.zeros(1, n, 1, dtype=torch.int64), 5, float(factor), 0)
        assert found.sum() == math.ceil(Fraction(factor) * n / 5), n


def test_a_first_choice_goes_before_an_earlier_token_s_second() -> None:
    index = torch.tensor([[[0, 1], [1, 0], [1, 2]]])
    found = within_capacity(index, 3, 0.5, 0)  # room for ceil(0.5 * 2 * 3 / 3) = 1 each
    assert found.tolist() == [[[True, False], [True, False], [False, True]]]


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def plain_block(model: Any, x: Tensor, own: dict[str, Tensor], factor: float | None) -> Tensor:
    """Route one row's tokens `[S, H]` by plain loops."""
    S = len(x)
    probabilities = (x @ own["mlp.gate.weight"].T).softmax(-1)
    index = [
        sorted(range(EXPERTS), key=lambda i, p=p: -p[i])[:TOP_K] for p in probabilities.tolist()
    ]
    kept = [[True] * TOP_K] * S
    if factor is not None:
        kept = plain_capacity([index], factor, model.config.min_capacity, [[True] * S])[0]
    out = torch.zeros_like(x)
    for token in range(S):
        gates = [probabilities[token][i] for i in index[token]]
        whole = sum(gates) if model.config.norm_topk_prob else 1.0
        for place, expert in enumerate(index[token]):
            if kept[token][place]:
                gate, up = (own["mlp.experts.gate_up_proj"][expert] @ x[token]).chunk(2)
                y = own["mlp.experts.down_proj"][expert] @ (gate * torch.sigmoid(gate) * up)
                out[token] += gates[place] / whole * y
    return out


def dense(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    gate = x @ own[f"{name}.gate_proj.weight"].T
    up = x @ own[f"{name}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ own[f"{name}.down_proj.weight"].T


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        ({"capacity_factor": 0.6, "min_capacity": 1}, 0.6),
        ({"capacity_factor": None}, None),
        ({"norm_topk_prob": False, "extra_mlp": False, "capacity_factor": 1.25}, 1.25),
    ],
)
def test_every_layer_is_the_plain_loop_in_training(
    overrides: dict[str, Any], factor: float | None
) -> None:
    """What comes in and out of each layer's second half, attention being tested with Grok-1."""
    model = wide("openmoe", **overrides).train()
    seen: dict[int, list[Tensor]] = {}
    for number, layer in enumerate(model.model.layers):
        layer.post_attention_norm.register_forward_pre_hook(
            lambda _module, args, number=number: seen.__setitem__(number, [args[0]])
        )
        layer.register_forward_hook(
            lambda _module, _args, output, number=number: seen[number].append(output)
        )
    with torch.no_grad():
        model(ids(rows=1, length=12), use_cache=False)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert len(seen) == 4
    for number, (before, after) in seen.items():
        prefix = f"model.layers.{number}."
        own = {n.removeprefix(prefix): p for n, p in weights.items() if n.startswith(prefix)}
        x = before[0]
        normed = norm(x, own["post_attention_norm.weight"])
        if number % 2:
            x = x + plain_block(model, normed, own, factor)
            if model.config.extra_mlp:
                x = x + dense(norm(x, own["pre_extra_norm.weight"]), own, "extra_mlp")
        else:
            x = x + dense(normed, own, "mlp")
        assert torch.allclose(after[0], x, atol=1e-10, rtol=0)


def test_a_token_that_finds_no_room_passes_through_the_residual() -> None:
    model = wide("openmoe", capacity_factor=0.01, min_capacity=0).train()
    block = model.model.layers[1].mlp
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = block(x, None)
        _, weight, _ = block.gate(x)
    kept = weight.view(2, 9, TOP_K).bool().any(-1)
    assert 0 < kept.sum() < 18
    assert not out[~kept].any()
    assert out[kept].abs().sum(-1).all()


def test_nothing_is_dropped_outside_training_unless_asked_for() -> None:
    rows = ids()
    with torch.no_grad():
        free = wide("openmoe", capacity_factor=0.5, min_capacity=1)(rows).logits
        unlimited = wide("openmoe", capacity_factor=None).train()(rows).logits
        limited = wide("openmoe", eval_capacity_factor=0.5, min_capacity=1)(rows).logits
        trained = wide("openmoe", capacity_factor=0.5, min_capacity=1).train()(rows).logits
    assert torch.equal(free, unlimited)
    assert torch.equal(limited, trained)
    assert not torch.allclose(free, limited)


def test_a_batch_does_not_change_what_is_dropped() -> None:
    """Capacity is a row's own, whatever other rows and padding are beside it."""
    model = wide("openmoe", eval_capacity_factor=0.6, min_capacity=1)
    first, second = ids(1, 9), ids(1, 16, seed=9)
    pad = torch.zeros(1, 7, dtype=first.dtype)
    padded = torch.cat([torch.cat([first, pad], dim=1), second])
    mask = torch.ones_like(padded)
    mask[0, 9:] = 0
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits
        assert torch.allclose(found[:1, :9], model(first).logits, atol=1e-10)
        assert torch.allclose(found[1:], model(second).logits, atol=1e-10)


def test_a_dropped_choice_counts_as_chosen_but_weighs_nothing() -> None:
    """In scores: TSR tells what the router wants, AGS what enters the sum."""
    example = Example(ids(1, 30)[0].tolist(), [True] * 30, "rows:1")
    free = profile_model(wide("openmoe"), [example])
    tight = profile_model(wide("openmoe", eval_capacity_factor=0.5, min_capacity=1), [example])
    first = moe_layers(wide("openmoe"))[0].index
    assert tight.layers[first].token == free.layers[first].token
    pairs = list(zip(tight.layers[first].gate, free.layers[first].gate, strict=True))
    assert all(a <= b + 1e-12 for a, b in pairs)
    assert sum(a for a, _ in pairs) < 0.9 * sum(b for _, b in pairs)


def test_the_loss_of_the_routers_is_weighted() -> None:
    model = wide("openmoe", router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    with torch.no_grad():
        out = model(ids(), output_router_logits=True)
    assert len(out.router_logits) == 2
    expected = 0.5 * load_balance_loss(out.router_logits, TOP_K)
    expected = expected + 0.25 * router_z_loss(out.router_logits)
    assert torch.allclose(out.aux_loss, expected, rtol=1e-12)

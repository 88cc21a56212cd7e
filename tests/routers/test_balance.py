"""Losses of routers against plain loops in float64 over tokens and experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from esft.routers.balance import (
    bias_step,
    device_balance,
    expert_balance,
    importance,
    load,
    load_balance,
    router_z,
    sequence_balance,
)

T, E, K = 14, 6, 2
DEVICES = [[0, 3, 4], [5], [2, 1]]
COUNTED = {
    "all": None,
    "some": torch.tensor([1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0]).bool(),
}


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, affinities and choices; some choices are of no expert, and not all are the best."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    index = (logits + torch.randn(T, E, generator=generator)).topk(K).indices
    index[1, 0], index[3, 1], index[6, 1] = E, E + 2, -1
    return logits.requires_grad_(), logits.softmax(-1), index


def kept(counted: Tensor | None) -> list[int]:
    return [t for t in range(T) if counted is None or counted[t]]


def f_and_p(p: Tensor, index: Tensor, tokens: list[int]) -> tuple[list[float], list[float]]:
    """DeepSeekMoE's f and P, equations 13 and 14."""
    f = [E / (K * len(tokens)) * sum(i in index[t].tolist() for t in tokens) for i in range(E)]
    P = [sum(p[t, i].item() for t in tokens) / len(tokens) for i in range(E)]
    return f, P


@pytest.mark.parametrize("which", COUNTED)
class TestLoop:
    def test_load_balance(self, which: str) -> None:
        _, p, index = made()
        tokens = kept(COUNTED[which])
        expected = 0.0
        for expert in range(E):
            f = sum(expert in index[t].tolist() for t in tokens) / len(tokens)
            expected += E * f * sum(p[t, expert].item() for t in tokens) / len(tokens)
        found = load_balance(p, index, COUNTED[which])
        assert found.item() == pytest.approx(expected, rel=1e-12)

    def test_expert_balance(self, which: str) -> None:
        _, p, index = made()
        f, P = f_and_p(p, index, kept(COUNTED[which]))
        expected = sum(a * b for a, b in zip(f, P, strict=True))
        found = expert_balance(p, index, COUNTED[which])
        assert found.item() == pytest.approx(expected, rel=1e-12)

    def test_device_balance(self, which: str) -> None:
        _, p, index = made()
        f, P = f_and_p(p, index, kept(COUNTED[which]))
        expected = 0.0
        for group in DEVICES:
            expected += sum(f[i] for i in group) / len(group) * sum(P[i] for i in group)
        found = device_balance(p, index, DEVICES, COUNTED[which])
        assert found.item() == pytest.approx(expected, rel=1e-12)

    def test_importance(self, which: str) -> None:
        _, p, index = made()
        weight = p.gather(1, index.clamp(0, E - 1)).detach()
        sums = [0.0] * E
        for t in kept(COUNTED[which]):
            for k in range(K):
                if 0 <= index[t, k] < E:
                    sums[int(index[t, k])] += weight[t, k].item()
        expected = statistics.pvariance(sums) / statistics.fmean(sums) ** 2
        found = importance(weight, index, E, COUNTED[which])
        assert found.item() == pytest.approx(expected, rel=1e-12)
        assert importance(16 * weight, index, E, COUNTED[which]).item() == pytest.approx(expected)

    def test_router_z(self, which: str) -> None:
        logits, _, _ = made()
        tokens = kept(COUNTED[which])
        expected = 0.0
        for t in tokens:
            expected += math.log(sum(math.exp(z) for z in logits[t].tolist())) ** 2 / len(tokens)
        assert router_z(logits, COUNTED[which]).item() == pytest.approx(expected, rel=1e-12)

    def test_load(self, which: str) -> None:
        _, _, index = made()
        chosen = [i for t in kept(COUNTED[which]) for i in index[t].tolist()]
        assert load(index, E, COUNTED[which]).tolist() == [chosen.count(i) for i in range(E)]


def test_sequence_balance() -> None:
    """Of rows of unequal length; one number is missing, as where a block ends with padding."""
    _, p, _ = made()
    rows = torch.tensor([0, 0, 0, 1, 1, -1, -1, 3, 3, 3, 3, 3, 4, -1])
    expected = []
    for row in (0, 1, 3, 4):
        tokens = [t for t in range(T) if rows[t] == row]
        total = 0.0
        for i in range(E):
            best = sum(i in sorted(range(E), key=lambda j: -p[t, j].item())[:K] for t in tokens)
            f = E / (K * len(tokens)) * best
            total += f * sum(p[t, i].item() for t in tokens) / len(tokens)
        expected.append(total)
    found = sequence_balance(p, rows, K)
    assert found.item() == pytest.approx(statistics.fmean(expected), rel=1e-12)


def test_one_choice_is_switch_transformers() -> None:
    """arXiv 2101.03961, equation 5: the share of tokens whose argmax an expert is."""
    _, p, _ = made()
    best = p.argmax(-1)
    expected = E * sum((best == i).double().mean().item() * p[:, i].mean().item() for i in range(E))
    assert load_balance(p, best[:, None]).item() == pytest.approx(expected, rel=1e-12)


def test_load_balance_is_transformers_of_one_layer() -> None:
    """Of several layers, transformers pools the tokens before it multiplies."""
    logits, p, _ = made()
    theirs = load_balancing_loss_func((logits.float(),), E, K)
    assert load_balance(p, p.topk(K).indices).item() == pytest.approx(theirs.item(), rel=1e-5)


def test_even_routing_is_where_the_losses_say() -> None:
    """Each expert gets as many tokens as any other, and as much probability."""
    p = torch.full((E, E), 1 / E, dtype=torch.float64)
    index = torch.stack([torch.arange(E), torch.arange(E).roll(1)], dim=1)
    assert load_balance(p, index).item() == pytest.approx(K)
    assert expert_balance(p, index).item() == pytest.approx(1)
    assert device_balance(p, index, [[0, 1, 2], [3, 4, 5]]).item() == pytest.approx(1)
    assert importance(torch.ones(E, K), index, E).item() == pytest.approx(0, abs=1e-12)
    assert router_z(torch.full((E, E), -math.log(E))).item() == pytest.approx(0, abs=1e-12)
    assert bias_step(load(index, E)).tolist() == [0] * E


def test_bias_step() -> None:
    """Towards more for those below the mean load, 3 here, and not at all for those at it."""
    assert bias_step(torch.tensor([5.0, 3.0, 0.0, 4.0, 3.0])).tolist() == [-1, 0, 1, -1, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "load_balance": lambda z, index: load_balance(z.softmax(-1), index),
    "expert_balance": lambda z, index: expert_balance(z.softmax(-1), index),
    "device_balance": lambda z, index: device_balance(z.softmax(-1), index, DEVICES),
    "sequence_balance": lambda z, _: sequence_balance(z.softmax(-1), torch.arange(T) // 5, K),
    "importance": lambda z, index: importance(
        z.softmax(-1).gather(1, index.clamp(0, E - 1)), index, E
    ),
    "router_z": lambda z, _: router_z(z),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """By finite differences of the value; choices have none."""
    logits, _, index = made()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, index), (logits,))


@pytest.mark.parametrize("name", LOSSES)
def test_sums_of_bfloat16_are_in_float32(name: str) -> None:
    logits, _, index = made()
    found = LOSSES[name](logits.detach().bfloat16().float(), index)
    assert found.dtype == torch.float32
    assert LOSSES[name](logits.detach().bfloat16(), index).dtype == torch.float32

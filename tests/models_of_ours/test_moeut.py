"""MoEUT against plain loops in float64: sigma-MoE, SwitchHead, shared layers, the regulariser."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from esft.data.example import Example
from esft.experts import attach
from esft.models import MoeutConfig
from esft.models.losses import usage_entropy
from esft.models.projection import ProjectionExperts
from esft.moe import moe_layers, trainable_parameters
from esft.profiling import profile_model
from esft.selection import Selection
from tests.models_of_ours.tiny_models import EXPERTS, HIDDEN, INNER, TOP_K, ids, tiny, wide

HEADS, HEAD_DIM, HEAD_EXPERTS, HEAD_TOP_K = 4, 16, 4, 2


def norm(x: Tensor, own: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-5).sqrt()
    return own[f"{name}.weight"] * scaled + own[f"{name}.bias"]


def sigmoids(weight: Tensor, x: Tensor, experts: int, top_k: int) -> list[dict[int, float]]:
    """For each run of `experts` rows of a router: expert id -> weight of the best."""
    logits = (weight @ x).tolist()
    return [
        {
            i: 1 / (1 + math.exp(-logits[i]))
            for i in sorted(range(first, first + experts), key=lambda i: -logits[i])[:top_k]
        }
        for first in range(0, len(logits), experts)
    ]


def turned(x: Tensor, place: int, channels: int) -> Tensor:
    """One head's vector, its first channels rotated: i goes with i + channels/2."""
    half = channels // 2
    out = x.clone()
    for i in range(half):
        angle = place * 10000.0 ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def switch_head(hidden: list[Tensor], own: dict[str, Tensor]) -> list[Tensor]:
    """Attention of one row, head by head and expert by expert."""
    normed = [norm(x, own, "attention_norm") for x in hidden]
    query, key = (
        [(own[f"self_attn.{kind}_proj.weight"] @ x).view(HEADS, HEAD_DIM) for x in normed]
        for kind in ("q", "k")
    )
    values = []
    for x, x_norm in zip(hidden, normed, strict=True):
        chosen = sigmoids(own["self_attn.value.router.weight"], x_norm, HEAD_EXPERTS, HEAD_TOP_K)
        # The residual stream itself, not its norm, goes through the experts.
        values.append(
            [
                sum(w * (own["self_attn.value.experts.weight"][i] @ x) for i, w in head.items())
                for head in chosen
            ]
        )
    out = []
    for place, x_norm in enumerate(normed):
        chosen = sigmoids(own["self_attn.output.router.weight"], x_norm, HEAD_EXPERTS, HEAD_TOP_K)
        total = torch.zeros_like(x_norm)
        for head in range(HEADS):
            q = turned(query[place][head], place, HEAD_DIM // 2)
            powers = [
                math.exp(q @ turned(key[other][head], other, HEAD_DIM // 2) / HEAD_DIM**0.5)
                for other in range(place + 1)
            ]
            seen = sum(p / sum(powers) * values[other][head] for other, p in enumerate(powers))
            for i, w in chosen[head].items():
                total += w * (own["self_attn.output.experts.weight"][i] @ seen)
        out.append(total)
    return out


def sigma_moe(x: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Feed-forward of one token: routed by the norm, computed on the residual stream itself."""
    (chosen,) = sigmoids(own["mlp.gate.weight"], norm(x, own, "mlp_norm"), EXPERTS, TOP_K)
    up, down = own["mlp.experts.up_proj"], own["mlp.experts.down_proj"]
    return sum(w * (down[i] @ (up[i] @ x).clamp(min=0)) for i, w in chosen.items())


def plain_loop(model: Any, row: list[int]) -> Tensor:
    """Return the logits of one row, `[S, V]`: the two layers twice, A-B-A-B."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    layers = [
        {
            name.removeprefix(f"model.layers.{number}."): p
            for name, p in weights.items()
            if name.startswith(f"model.layers.{number}.")
        }
        for number in range(2)
    ]
    hidden = [weights["model.embed_tokens.weight"][i] for i in row]
    for own in [layers[0], layers[1], layers[0], layers[1]]:
        hidden = [x + y for x, y in zip(hidden, switch_head(hidden, own), strict=True)]
        hidden = [x + sigma_moe(x, own) for x in hidden]
    final = {"norm.weight": weights["model.norm.weight"], "norm.bias": weights["model.norm.bias"]}
    head, bias = weights["lm_head.weight"], weights["lm_head.bias"]
    return torch.stack([head @ norm(x, final, "norm") + bias for x in hidden])


def test_logits_are_the_plain_loop() -> None:
    model = wide("moeut")
    row = ids(rows=1, length=7)
    with torch.no_grad():
        found = model(row).logits[0]
    assert torch.allclose(found, plain_loop(model, row[0].tolist()), atol=1e-10, rtol=0)


def test_weights_are_shared_between_uses_and_the_depth_is_free() -> None:
    shallow, deep = (tiny("moeut", num_hidden_layers=depth) for depth in (2, 6))
    assert {n: p.shape for n, p in shallow.named_parameters()} == {
        n: p.shape for n, p in deep.named_parameters()
    }
    with torch.no_grad():
        out = deep(ids(), use_cache=True, output_hidden_states=True)
    assert len(out.hidden_states) == 7
    assert len(out.past_key_values) == 6  # each use of a layer has keys and values of its own
    assert not torch.allclose(out.logits, shallow(ids()).logits)


def plain_entropy(logits: list[list[list[float]]], real: list[bool]) -> float:
    """Entropy of one row's mean distribution over uses and tokens: `logits[use][token][expert]`."""
    mean = [0.0] * len(logits[0][0])
    for use in logits:
        for token, z in enumerate(use):
            if real[token]:
                for expert, value in enumerate(z):
                    share = math.exp(value) / sum(map(math.exp, z))
                    mean[expert] += share / sum(real) / len(logits)
    return -sum(p * math.log(p) for p in mean)


@pytest.mark.parametrize("padded", [False, True])
def test_the_regulariser_is_the_plain_loop(padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 9, 5, generator=generator, dtype=torch.float64) * 2 for _ in range(3)]
    real = torch.ones(2, 9, dtype=torch.int64)
    if padded:
        real[0, 5:] = 0
        real[1, :2] = 0
    expected = [
        plain_entropy([use[row].tolist() for use in logits], real[row].bool().tolist())
        for row in range(2)
    ]
    found = usage_entropy(logits, real if padded else None)
    assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-12)


def test_the_most_even_use_has_the_highest_entropy() -> None:
    even = torch.full((2, 6, 5), 0.3)
    turns = 50.0 * torch.eye(5).repeat(2, 1)[None].expand(2, -1, -1)  # sure, but of each in turn
    one = 50.0 * torch.eye(5)[:1].expand(2, 6, -1)
    assert usage_entropy([even]).item() == pytest.approx(math.log(5))
    assert usage_entropy([turns]).item() == pytest.approx(math.log(5), rel=1e-5)
    assert usage_entropy([one]).item() == pytest.approx(0, abs=1e-6)
    # Two uses of a layer are one distribution: each may specialise.
    other = 50.0 * torch.eye(5)[1:2].expand(2, 6, -1)
    assert usage_entropy([one, other]).item() == pytest.approx(math.log(2), rel=1e-5)


def test_the_loss_of_the_routers_is_that_of_each_layer_over_its_uses() -> None:
    model = wide("moeut", entropy_coef=0.5, attention_entropy_coef=0.25)
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("gate", "router")):
            module.register_forward_hook(
                lambda _module, _args, output, name=name: seen.setdefault(name, []).append(
                    output[0]
                )
            )
    with torch.no_grad():
        found = model(ids(), output_router_logits=True).aux_loss
    assert len(seen) == 6
    expected = 0.0
    for name, uses in seen.items():
        heads, coefficient = (1, 0.5) if name.endswith("gate") else (HEADS, 0.25)
        assert len(uses) == 2
        for row in range(2):
            for head in range(heads):
                logits = [use.view(2, 24, heads, -1)[row, :, head].tolist() for use in uses]
                entropy = plain_entropy(logits, [True] * 24)
                expected -= coefficient * entropy / heads / 2
    assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("sums_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_routed_projections_are_the_plain_loop(sums_heads: bool, dtype: torch.dtype) -> None:
    """With experts that nobody chooses, and through both banks while a selection is attached."""
    generator = torch.Generator().manual_seed(0)
    experts = ProjectionExperts(2, 6, 8, 4, sums_heads).to(dtype)
    torch.nn.init.normal_(experts.weight, generator=generator)
    x = torch.randn(5, 2 if sums_heads else 1, 8, generator=generator, dtype=dtype)
    index = torch.tensor([[0, 2, 3, 4], [2, 0, 4, 3], [2, 0, 3, 4], [0, 2, 4, 3], [0, 2, 4, 3]])
    weight = torch.rand(5, 4, generator=generator).to(dtype)
    out = torch.zeros(5, 2, 4, dtype=dtype)
    for token in range(5):
        for place in range(4):
            head = place // 2
            row = x[token, head if sums_heads else 0]
            matrix = experts.weight[index[token, place]].detach()
            out[token, head] += weight[token, place] * (matrix @ row)
    expected = out.sum(1) if sums_heads else out
    assert torch.allclose(experts(x, index, weight), expected, atol=1e-5)


def test_only_the_selected_projections_have_gradients() -> None:
    model = tiny("moeut")
    selection = {0: [1], 2: [3, 0], 5: [15]}
    attach(model, Selection(experts=selection))
    model(ids(), labels=ids()).loss.backward()
    trained = trainable_parameters(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained)
    sizes = {2 * HIDDEN * INNER, 2 * HIDDEN * HEAD_DIM, HIDDEN * HEAD_DIM}
    assert sum(p.numel() for p in trained.values()) == sum(sizes)
    assert all(p.grad.norm() > 0 for p in trained.values())


def test_scores_pool_over_the_uses_of_a_layer() -> None:
    """Each use counts as tokens of its own; the attention's experts come after the others."""
    model = tiny("moeut")
    names = [layer.name for layer in moe_layers(model)]
    assert names == [
        f"model.layers.{number}.{kind}.experts"
        for kind in ("mlp", "self_attn.value", "self_attn.output")
        for number in range(2)
    ]
    found = profile_model(model, [Example(ids(1, 20)[0].tolist(), [True] * 20, "rows:1")])
    assert found.sample["tokens"] == 20
    for index, layer in found.layers.items():
        assert layer.tokens == 40
        assert sum(layer.token) == pytest.approx(1)
        expected = (EXPERTS, TOP_K) if index < 2 else (16, HEADS * HEAD_TOP_K)
        assert (layer.experts, layer.top_k) == expected
        if index >= 2:  # each head has its share
            for head in range(HEADS):
                own = layer.token[head * HEAD_EXPERTS : (head + 1) * HEAD_EXPERTS]
                assert sum(own) == pytest.approx(1 / HEADS)


def test_the_defaults_are_the_paper_s_model_of_244_million() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MoeutConfig())
    attention = 2 * 1024 * 4 * 128 + 2 * 4 * 10 * (128 * 1024 + 1024)
    layer = attention + 387 * (2 * 1024 * 128 + 1024) + 2 * 2 * 1024
    size = sum(p.numel() for p in model.parameters())
    assert size == 2 * layer + 2 * 8000 * 1024 + 8000 + 2 * 1024
    assert size == pytest.approx(244e6, rel=0.01)


def test_initial_values_shrink_with_depth_and_routers_rows_are_alike() -> None:
    config = MoeutConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=8,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        attention_num_experts=3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[1]
    spread = 0.5  # sqrt(2 / 8)
    for weight, inputs in (
        (layer.self_attn.q_proj.weight, 64),
        (layer.self_attn.k_proj.weight, 64),
        (layer.self_attn.value.experts.weight, 64),
        (layer.self_attn.output.experts.weight, 4 * 32),
        (layer.mlp.experts.up_proj, 64),
        (layer.mlp.experts.down_proj, 16 * 32),
        (layer.mlp.gate.weight, 64),
        (layer.self_attn.output.router.weight, 64),
    ):
        assert weight.std().item() == pytest.approx(spread / inputs**0.5, rel=0.06), weight.shape
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1 / 8, rel=0.06)
    for router in (layer.mlp.gate, layer.self_attn.value.router):
        lengths = router.weight.norm(dim=-1)
        assert torch.allclose(lengths, lengths[0].expand_as(lengths), rtol=1e-5)


def test_a_depth_that_the_group_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers 5 is no multiple of group_size 2"):
        MoeutConfig(num_hidden_layers=5)

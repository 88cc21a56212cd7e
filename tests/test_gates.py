"""What a gate value is, scheme by scheme: profiles against routing computed anew in float64.

Each oracle takes one token's hidden state, as it reaches the router, and the router's weights, and
returns the gates of the chosen experts by the definition in docs/families-gates.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esft.data.example import Example
from esft.moe import moe_layers
from esft.profiling import profile_model
from tests.families import small
from tests.models import EXPERTS, INNER, TOP_K, VOCAB, tiny
from tests.multimodal import wrapper
from tests.test_layouts import model_of

Gates = dict[int, float]
Oracle = Callable[[Any, Tensor, int], Gates]


def best(scores: Tensor, k: int = TOP_K) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def weight_of(router: Any) -> Tensor:
    linear = getattr(router, "layer", getattr(router, "classifier", router))
    return linear.weight.double()


def logits(router: Any, x: Tensor) -> Tensor:
    found = weight_of(router) @ x
    bias = getattr(router, "bias", None)
    return found if bias is None else found + bias.double()


def normalised(gates: Gates) -> Gates:
    total = sum(gates.values())
    return {i: gate / total for i, gate in gates.items()}


def pick(scores: Tensor, chosen: list[int]) -> Gates:
    return {i: float(scores[i]) for i in chosen}


def softmax_then_topk(router: Any, x: Tensor, _token: int) -> Gates:
    p = logits(router, x).softmax(0)
    return pick(p, best(p))


def softmax_then_topk_normalised(router: Any, x: Tensor, token: int) -> Gates:
    return normalised(softmax_then_topk(router, x, token))


def topk_then_softmax(router: Any, x: Tensor, _token: int) -> Gates:
    z = logits(router, x)
    chosen = best(z)
    return dict(zip(chosen, z[chosen].softmax(0).tolist(), strict=True))


def topk_then_sigmoid(router: Any, x: Tensor, _token: int) -> Gates:
    z = logits(router, x)
    return pick(z.sigmoid(), best(z))


def sigmoid_normalised(router: Any, x: Tensor, token: int) -> Gates:
    return normalised(topk_then_sigmoid(router, x, token))


def groups_by_best(router: Any, x: Tensor, _token: int) -> Gates:
    """DeepSeek-V2: of two groups, the one with the likelier best expert."""
    p = logits(router, x).softmax(0)
    half = EXPERTS // 2
    first = 0 if max(p[:half]) > max(p[half:]) else half
    return pick(p, [first + i for i in best(p[first : first + half])])


def groups_by_two(router: Any, x: Tensor, _token: int) -> Gates:
    """DeepSeek-V3: by the sum of a group's two best biased scores; the bias does not weigh."""
    s = logits(router, x).sigmoid()
    biased = s + router.e_score_correction_bias.double()
    half = EXPERTS // 2
    sums = [sum(sorted(part, reverse=True)[:2]) for part in (biased[:half], biased[half:])]
    first = 0 if sums[0] > sums[1] else half
    return pick(s, [first + i for i in best(biased[first : first + half])])


def groups_by_two_normalised(router: Any, x: Tensor, token: int) -> Gates:
    return normalised(groups_by_two(router, x, token))


def ernie(router: Any, x: Tensor, _token: int) -> Gates:
    p = logits(router, x).softmax(0)
    biased = p + router.moe_statics.e_score_correction_bias.double().flatten()
    return normalised(pick(p, best(biased)))


def dbrx_norm_2(router: Any, x: Tensor, _token: int) -> Gates:
    p = logits(router, x).softmax(0)
    gates = pick(p, best(p))
    length = sum(gate**2 for gate in gates.values()) ** 0.5
    return {i: gate / length for i, gate in gates.items()}


def longcat(router: Any, x: Tensor, _token: int) -> Gates:
    """Ids from E on are none of the experts; they take their place among the K."""
    p = logits(router, x).softmax(0)
    biased = p + router.e_score_correction_bias.double()
    return pick(p, best(biased))


def deepseek_v4(router: Any, x: Tensor, token: int) -> Gates:
    z = weight_of(router) @ x
    s = (1 + z.exp()).log().sqrt()  # sqrtsoftplus
    if hasattr(router, "tid2eid"):
        chosen = router.tid2eid[token].tolist()
    else:
        chosen = best(s + router.e_score_correction_bias.double())
    return normalised(pick(s, chosen))


def gemma4(router: Any, x: Tensor, _token: int) -> Gates:
    mean_square = float((x * x).mean()) + router.eps
    x = x / mean_square**0.5 * router.scale.double() * router.hidden_size**-0.5
    p = (router.proj.weight.double() @ x).softmax(0)
    scale = router.per_expert_scale.double()
    return {i: gate * float(scale[i]) for i, gate in normalised(pick(p, best(p))).items()}


def biases(model: Any, spread: float = 0.2) -> Any:
    """Give every score-correction bias numbers that change who is chosen."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "correction_bias" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator).to(tensor) * spread
    return model


def moderate(family: str, **overrides: Any) -> Any:
    """A random model of a family that `tests.models` does not have, in fp32."""
    model = small(family, **overrides).float()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        mean = 1.0 if parameter.dim() == 1 and not name.endswith("bias") else 0.0
        parameter.data = mean + torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def deepseek_v4_model() -> Any:
    model = biases(
        moderate(
            "deepseek_v4",
            mlp_layer_types=["hash_moe", "moe", "moe"],
            layer_types=["sliding_attention"] * 3,
            q_lora_rank=16,
            o_lora_rank=16,
            o_groups=2,
            routed_scaling_factor=2.5,
        )
    )
    generator = torch.Generator().manual_seed(9)
    for layer in moe_layers(model):
        if hasattr(layer.router, "tid2eid"):
            rows = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(VOCAB)]
            layer.router.tid2eid.data = torch.stack(rows)  # type: ignore[union-attr]
    return model


# Name -> model, oracle, sum of a layer's gates (None where it depends on the tokens).
SCHEMES: dict[str, tuple[Callable[[], Any], Oracle, float | None]] = {
    "softmax, top-k (olmoe)": (lambda: tiny("olmoe"), softmax_then_topk, None),
    "softmax, top-k, normalised (qwen3_moe)": (
        lambda: tiny("qwen3_moe"),
        softmax_then_topk_normalised,
        1,
    ),
    "softmax, top-k, times 2.5 (deepseek_v2)": (
        lambda: tiny("deepseek_v2", routed_scaling_factor=2.5),
        softmax_then_topk,
        None,
    ),
    "softmax, top-k (a list of modules)": (lambda: model_of("listed"), softmax_then_topk, None),
    "top-k, softmax, router bias (gpt_oss)": (lambda: moderate("gpt_oss"), topk_then_softmax, 1),
    "top-k, softmax (granitemoe)": (lambda: moderate("granitemoe"), topk_then_softmax, 1),
    "top-k, softmax (jetmoe)": (lambda: tiny("jetmoe"), topk_then_softmax, 1),
    "top-k, sigmoid (llama4_text)": (lambda: tiny("llama4_text"), topk_then_sigmoid, None),
    "sigmoid, normalised (cohere2_moe)": (
        lambda: moderate("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=True),
        sigmoid_normalised,
        1,
    ),
    "sigmoid, not normalised (cohere2_moe)": (
        lambda: moderate("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=False),
        topk_then_sigmoid,
        None,
    ),
    "groups by best (deepseek_v2)": (
        lambda: tiny(
            "deepseek_v2",
            topk_method="group_limited_greedy",
            n_group=2,
            topk_group=1,
            routed_scaling_factor=16.0,
        ),
        groups_by_best,
        None,
    ),
    "groups by two, bias, normalised, times 2.5 (deepseek_v3)": (
        lambda: biases(moderate("deepseek_v3", norm_topk_prob=True)),
        groups_by_two_normalised,
        1,
    ),
    "groups by two, bias, times 2.5 (glm4_moe)": (
        lambda: biases(moderate("glm4_moe", norm_topk_prob=False)),
        groups_by_two,
        None,
    ),
    "softmax, bias, normalised (ernie4_5_moe)": (
        lambda: biases(moderate("ernie4_5_moe")),
        ernie,
        1,
    ),
    "softmax, 1-norm (dbrx)": (lambda: tiny("dbrx"), softmax_then_topk_normalised, 1),
    "softmax, 2-norm (dbrx)": (
        lambda: tiny(
            "dbrx",
            ffn_config={
                "ffn_hidden_size": INNER,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
                "moe_normalize_expert_weights": 2.0,
            },
        ),
        dbrx_norm_2,
        None,
    ),
    "softmax, bias, identity experts, times 2.5 (longcat_flash)": (
        lambda: biases(tiny("longcat_flash")),
        longcat,
        None,
    ),
    "hash-routed first layers, bias, normalised, times 2.5 (deepseek_v4)": (
        deepseek_v4_model,
        deepseek_v4,
        1,
    ),
    "normalised, times a scale per expert (gemma4_text)": (
        lambda: moderate("gemma4_text"),
        gemma4,
        None,
    ),
    # Inside a model that reads images too.
    "softmax, top-k, normalised (qwen3_vl_moe)": (
        lambda: wrapper("qwen3_vl_moe"),
        softmax_then_topk_normalised,
        1,
    ),
    "groups by two, bias, normalised, times 2.5 (glm4v_moe)": (
        lambda: biases(wrapper("glm4v_moe")),
        groups_by_two_normalised,
        1,
    ),
    "top-k, softmax (aria)": (lambda: wrapper("aria"), topk_then_softmax, 1),
    "top-k, sigmoid (llama4)": (lambda: wrapper("llama4"), topk_then_sigmoid, None),
}


def rows() -> list[Example]:
    rng = random.Random(1)
    lengths = (5, 21, 34, 2)
    return [
        Example([rng.randrange(3, VOCAB) for _ in range(n)], [True] * n, f"rows:{n}")
        for n in lengths
    ]


@pytest.mark.parametrize("name", SCHEMES)
def test_scores_are_the_definition_s(name: str) -> None:
    make, oracle, mass = SCHEMES[name]
    model, examples = make(), rows()
    layers = moe_layers(model)
    seen: dict[int, Tensor] = {}
    for layer in layers:
        assert layer.router is not None
        layer.router.register_forward_pre_hook(
            lambda _module, args, index=layer.index: seen.__setitem__(index, args[0])
        )
    counts = {layer.index: [0] * EXPERTS for layer in layers}
    sums = {layer.index: [0.0] * EXPERTS for layer in layers}
    others = {layer.index: 0 for layer in layers}
    for example in examples:
        with torch.no_grad():
            model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
        for layer in layers:
            hidden = seen[layer.index].reshape(len(example.input_ids), -1).double()
            for token, x in zip(example.input_ids, hidden, strict=True):
                with torch.no_grad():
                    gates = oracle(layer.router, x, token)
                assert len(gates) == TOP_K
                for expert, gate in gates.items():
                    if expert >= EXPERTS:
                        others[layer.index] += 1
                    else:
                        counts[layer.index][expert] += 1
                        sums[layer.index][expert] += gate
    found = profile_model(model, examples)
    tokens = sum(len(example.input_ids) for example in examples)
    assert set(found.layers) == set(counts)
    for index, layer in found.layers.items():
        assert layer.token == pytest.approx([n / TOP_K / tokens for n in counts[index]], abs=1e-12)
        assert layer.gate == pytest.approx([g / tokens for g in sums[index]], abs=2e-6)
        assert sum(layer.token) == pytest.approx(1 - others[index] / TOP_K / tokens)
        assert sum(n > 0 for n in counts[index]) > 2  # the routers do choose
        if mass is not None:
            assert sum(layer.gate) == pytest.approx(mass, abs=1e-5)
    assert any(others.values()) == ("identity" in name)


def test_a_skip_class_counts_as_none_of_the_experts() -> None:
    """ZAYA's router has a class more than there are experts, and writes expert 0 for it."""
    model = moderate("zaya", num_experts_per_tok=1, router_hidden_size=16)
    examples = rows()
    layers = moe_layers(model)
    seen: dict[int, Tensor] = {}
    for layer in layers:
        # The routers of the other layers, whose input varies little, would skip all tokens.
        layer.router.balancing_biases.data[-1] = 0.1 if layer.index == 1 else -1.0  # type: ignore[union-attr, index]
        layer.router.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, _args, output, index=layer.index: seen.__setitem__(index, output[0])
        )
    counts = {layer.index: [0] * (EXPERTS + 1) for layer in layers}
    sums = {layer.index: [0.0] * (EXPERTS + 1) for layer in layers}
    for example in examples:
        with torch.no_grad():
            model(torch.tensor([example.input_ids]), use_cache=False)
        for layer in layers:
            biases_ = layer.router.balancing_biases.double()  # type: ignore[union-attr, operator]
            for z in seen[layer.index].double():
                p = z.softmax(0)
                for expert in best(p + biases_, layer.top_k):
                    counts[layer.index][expert] += 1
                    sums[layer.index][expert] += float(p[expert])
    found = profile_model(model, examples)
    tokens = sum(len(example.input_ids) for example in examples)
    for layer in layers:
        scores, total = found.layers[layer.index], tokens * layer.top_k
        expected = [n / total for n in counts[layer.index][:EXPERTS]]
        assert scores.token == pytest.approx(expected, abs=1e-12)
        assert scores.gate == pytest.approx(
            [gate / tokens for gate in sums[layer.index][:EXPERTS]], abs=2e-6
        )
    assert sum(count[EXPERTS] for count in counts.values()) > 0

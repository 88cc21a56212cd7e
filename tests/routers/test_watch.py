"""What routers compute, seen from outside, in every way of routing; also under checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from esft.errors import ModelError, RecipeError
from esft.experts import attach
from esft.moe import moe_layers
from esft.routers.balance import importance, load_balance, router_z
from esft.routers.watch import RouterWatch
from esft.selection import Selection
from tests.families import small
from tests.models import tiny
from tests.models_of_ours import tiny_models as own_models
from tests.router_passes import check_bias, check_passes, run, watch
from tests.test_gates import deepseek_v4_model, moderate
from tests.test_layouts import model_of
from tests.training_loop import batches

# Families of transformers are checked by tests/test_families.py, in one configuration each.
STYLES: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "qwen3_moe": (lambda: tiny("qwen3_moe"), "softmax, top-k", False),
    "cohere2_moe, sigmoid": (
        lambda: moderate("cohere2_moe", expert_selection_fn="sigmoid"),
        "top-k, sigmoid",
        False,
    ),
    "deepseek_v4": (deepseek_v4_model, "sqrt-softplus, first layers by token id", True),
    "code of a checkpoint": (lambda: model_of("listed"), "softmax, top-k", False),
    "grok1": (lambda: own_models.tiny("grok1"), "softmax, top-k", False),
    "openmoe": (lambda: own_models.tiny("openmoe"), "softmax, top-k", False),
}
CHECKPOINTED: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: tiny("qwen3_moe"),
    "llama4_text": lambda: tiny("llama4_text"),
    "longcat_flash": lambda: tiny("longcat_flash"),
    "code of a checkpoint": lambda: normalising(model_of("listed")),
}


def normalising(model: Any) -> Any:
    """Let routers divide the weights of a token by their sum."""
    for layer in moe_layers(model):
        layer.router.norm_topk_prob = True  # type: ignore[union-attr, assignment]
    return model


@pytest.mark.parametrize("style", STYLES)
def test_affinities_are_those_behind_the_experts_weights(style: str) -> None:
    make, scoring, biased = STYLES[style]
    model = make()
    check_bias(model, check_passes(model, scoring), biased, style)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    passes = watch(model, ids)
    losses = [
        load_balance(x.affinity, x.index)
        + importance(x.weight, x.index, x.layer.num_experts)
        + router_z(x.logits)
        for x in passes
    ]
    return torch.stack(losses).mean()


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (loss_of(model, ids)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("style", "attached"), [("qwen3_moe", False), *((style, True) for style in CHECKPOINTED)]
)
def test_gradient_checkpointing_changes_no_gradient(style: str, attached: bool) -> None:
    """Hooks that compute would save tensors that the second run of a layer does not have."""
    model, ids = CHECKPOINTED[style](), batches(1)[0]
    if attached:
        picked = {layer.index: [1, 4] for layer in moe_layers(model)}
        attach(model, Selection(picked))
    model.requires_grad_(True).train()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, ids)
    assert found.keys() == expected.keys()
    assert any("router" in name or "gate." in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model, ids = tiny("qwen3_moe").train(), batches(1)[0]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RecipeError, match="use_reentrant: false"):
        watch(model, ids)


def hooks(model: Any) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def test_hooks_are_there_during_the_forward_pass_only() -> None:
    model, ids = tiny("qwen3_moe"), batches(1)[0]
    before = hooks(model)
    watching = RouterWatch(moe_layers(model))
    assert hooks(model) == before
    with watching.watching():
        assert hooks(model) > before
        run(model, ids)
    assert hooks(model) == before
    with pytest.raises(ZeroDivisionError), watching.watching():
        raise ZeroDivisionError
    assert hooks(model) == before


def test_what_is_seen_is_what_the_model_computes_without_being_watched() -> None:
    model, ids = tiny("olmoe"), batches(1)[0]
    plain = run(model, ids).logits
    watching = RouterWatch(moe_layers(model))
    with watching.watching():
        assert torch.equal(run(model, ids).logits, plain)


def test_layers_that_look_experts_up_are_left_out() -> None:
    model = deepseek_v4_model()
    assert [layer.index for layer in moe_layers(model)] == [0, 1, 2]
    assert [layer.index for layer in RouterWatch(moe_layers(model)).layers] == [1, 2]
    with pytest.raises(ModelError, match="by token id"):
        RouterWatch(moe_layers(model)[:1])


def test_a_router_that_hides_its_logits_is_refused_if_they_cannot_be_computed() -> None:
    """Code of a checkpoint: scores that are not those of its input times its weight."""
    model, ids = model_of("listed"), batches(1)[0]
    for layer in moe_layers(model):
        forward = layer.router.forward  # type: ignore[union-attr]

        def flattened(hidden: Tensor, forward: Any = forward) -> Any:
            index, weight, loss = forward(hidden)
            return index, weight.sqrt(), loss

        layer.router.forward = flattened  # type: ignore[union-attr, method-assign, assignment]
    with pytest.raises(ModelError, match="does not weigh by the softmax or sigmoid"):
        watch(model, ids)

    model = model_of("listed")
    for layer in moe_layers(model):
        layer.router.scale = torch.nn.Parameter(torch.ones(1))  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="cannot be computed from its weights"):
        watch(model, ids)


def test_tokens_that_do_not_fit_are_refused() -> None:
    model, ids = tiny("qwen3_moe"), batches(1)[0]
    watching = RouterWatch(moe_layers(model))
    with watching.watching() as seen:
        run(model, ids)
    with pytest.raises(ModelError, match=r"48 rows of logits .* for 47 tokens"):
        watching.passes(seen, 47)


def test_bfloat16_is_widened() -> None:
    model = copy.deepcopy(small("qwen3_moe"))
    seen = watch(model, batches(1)[0])[0]
    assert seen.logits.dtype == torch.bfloat16
    assert seen.affinity.dtype == torch.float32
    assert seen.affinity.sum(-1).allclose(torch.ones(()), atol=1e-6)


def test_a_layer_that_runs_several_times_is_seen_as_often() -> None:
    """MoEUT runs its two layers twice; its attention has routers of its own."""
    model, ids = own_models.tiny("moeut"), batches(1)[0]
    layers = moe_layers(model)
    passes = watch(model, ids)
    uses = [sum(seen.layer.name == layer.name for seen in passes) for layer in layers]
    repeats = model.config.num_hidden_layers // model.config.group_size
    assert repeats > 1
    assert set(uses) == {repeats}
    for seen in passes:
        score = seen.logits.sigmoid()
        torch.testing.assert_close(seen.affinity, score / score.sum(-1, keepdim=True))
        torch.testing.assert_close(score.gather(1, seen.index), seen.weight)
    first, second = passes[:2]
    assert first.layer.name == second.layer.name
    assert not torch.equal(first.logits, second.logits)

"""Checks of what `esft.routers.watch` sees, against what the experts were called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esft.errors import ModelError
from esft.moe import moe_layers
from esft.routers.balance import expert_balance, importance
from esft.routers.bias_update import BiasUpdate
from esft.routers.watch import RouterPass, RouterWatch
from tests.expert_calls import watched
from tests.training_loop import batches

# Families in bfloat16 round their weights; affinities are not rounded.
TOLERANCE = 0.02
LENGTH = 8


def run(model: Any, ids: Tensor) -> Any:
    """Run a model, decoder on the same ids as encoder where it has both."""
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **both)


def watch(model: Any, ids: Tensor) -> list[RouterPass]:
    """Return what the routers computed for a batch `[B, S]`."""
    watch = RouterWatch(moe_layers(model))
    with watch.watching() as seen:
        run(model, ids)
    return watch.passes(seen, ids.numel())


def check_passes(model: Any, scoring: str) -> list[RouterPass]:
    """Check that affinities are those behind the weights that experts get, with gradients.

    Args:
        model: of any family that trains.
        scoring: how its router works, as docs/families.md says.
    """
    ids = batches(1)[0][:, :LENGTH]
    returned: dict[str, Any] = {}
    hooks = [
        layer.router.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, _args, output, at=layer.name: returned.__setitem__(at, output)
        )
        for layer in moe_layers(model)
    ]
    with watched(model) as (calls, _):
        passes = watch(model, ids)
    for hook in hooks:
        hook.remove()
    # Code of a checkpoint calls each expert by itself, with what its router returned.
    choices = {path: call for path, (call,) in calls.items()} or {
        path: output[:2] for path, output in returned.items()
    }
    hashed = {layer.name for layer in moe_layers(model) if hasattr(layer.router, "tid2eid")}
    assert [seen.layer.name for seen in passes] == [x for x in choices if x not in hashed]
    for seen in passes:
        layer, E = seen.layer, seen.layer.num_experts
        index, weight = choices[layer.name]
        K = layer.top_k
        assert seen.affinity.shape == (ids.numel(), E)
        assert torch.equal(seen.index.clamp(max=E - 1), index.reshape(-1, K).clamp(max=E - 1)) or (
            layer.layout.others
        )
        real = (seen.index >= 0) & (seen.index < E)
        given = weight.detach().reshape(-1, K).float() / layer.gate_scale
        if "scale per expert" in scoring:
            given = given / layer.router.per_expert_scale.float()[index.reshape(-1, K)]  # type: ignore[union-attr, index]
        behind = seen.affinity.detach().gather(1, seen.index.clamp(0, E - 1))
        if scoring == "sparsemixer":  # chooses with a softmax over some of the logits
            assert torch.equal(behind[:, 0], seen.affinity.detach().amax(dim=1))
        elif K == 1:
            assert ((behind - given) * real).abs().max() < TOLERANCE
        else:
            shares = [
                x * real / (x * real).sum(-1, keepdim=True).clamp(min=1e-9) for x in (behind, given)
            ]
            assert (shares[0] - shares[1]).abs().max() < TOLERANCE
        whole = seen.logits.shape[-1] == E
        assert seen.affinity.sum(-1).allclose(torch.ones(())) or not whole
        # Logits before any normalisation.
        assert not seen.logits.float().exp().sum(-1).allclose(torch.ones(()), atol=0.02)
    losses = [
        expert_balance(x.affinity, x.index) + importance(x.weight, x.index, x.layer.num_experts)
        for x in passes
    ]
    routers = [list(x.layer.router.parameters()) for x in passes]  # type: ignore[union-attr]
    flat = [p for parameters in routers for p in parameters]
    found = torch.autograd.grad(torch.stack(losses).sum(), flat, allow_unused=True)
    has = {id(p): g is not None and bool(g.any()) for p, g in zip(flat, found, strict=True)}
    assert all(any(has[id(p)] for p in parameters) for parameters in routers)
    return passes


def check_bias(model: Any, passes: list[RouterPass], biased: bool, family: str) -> None:
    """Check that a bias to choose with is found where there is one, and moves who is chosen.

    Args:
        model: in bfloat16 or float32; its biases are changed.
        passes: from `check_passes`.
        biased: whether the family's routers have one.
        family: for messages.
    """
    layers = RouterWatch(moe_layers(model)).layers
    if not biased:
        with pytest.raises(ModelError, match=family):
            BiasUpdate(layers, 1.0, family)
        return
    ids = batches(1)[0][:, :LENGTH]
    update = BiasUpdate(layers, 1e4, family)
    update.count(passes, torch.ones(ids.numel(), dtype=torch.bool))
    update.step()
    after = watch(model, ids)
    busy = {p.layer.name: p.index.flatten().bincount(minlength=64).argmax() for p in passes}
    for seen in after:
        assert not (seen.index == busy[seen.layer.name]).any()

"""Gradient checkpointing: the same bits, and only what the backward pass needs computed again."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from esft.errors import RecipeError
from esft.experts import attach
from esft.run.recomputation import recompute_layers
from esft.selection import Selection
from tests.models import HIDDEN, tiny
from tests.training_loop import batches

LAYERS = 4


def model_of(family: str, selected: dict[int, list[int]]) -> Any:
    """A model that trains some experts, in training mode."""
    model = attach(tiny(family, num_hidden_layers=LAYERS), Selection(selected))
    return model.train()


class Held:
    """A tensor that is saved for the backward pass, as long as it is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def step(model: Any) -> tuple[float, dict[str, Tensor], Counter[int], Counter[int]]:
    """Run one step; return the loss, the gradients, how often each layer's attention ran, and how
    many bytes of activations each layer held between the forward pass and the backward pass."""
    calls: Counter[int] = Counter()
    inside: list[int] = []
    saved: list[tuple[int, weakref.ref[Held]]] = []
    handles = []
    for number, layer in enumerate(model.model.layers):
        attended = layer.self_attn.register_forward_hook(
            lambda *_, number=number: calls.update([number])
        )
        entered = layer.register_forward_pre_hook(lambda *_, number=number: inside.append(number))
        left = layer.register_forward_hook(lambda *_: inside.clear())
        handles += [attended, entered, left]
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Held:
        held = Held(tensor)
        if tensor.data_ptr() not in weights:
            saved.extend((number, weakref.ref(held)) for number in inside)
        return held

    ids = batches(1)[0]
    # What a layer computes that will compute it again is saved by hooks of its own, which drop it.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    held_bytes: Counter[int] = Counter()
    for number, reference in saved:
        if (held := reference()) is not None:
            held_bytes[number] += held.tensor.nbytes
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients, calls, held_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_same_bits_and_nothing_twice(family: str) -> None:
    model = model_of(family, {2: [1, 3], 3: [0]})
    loss, gradients, calls, _ = step(model)
    assert calls == {0: 1, 1: 1, 2: 1, 3: 1}
    recompute_layers(model)
    again = step(model)
    assert again[0] == loss
    assert again[1].keys() == gradients.keys()
    assert all(torch.equal(again[1][name], gradients[name]) for name in gradients)
    # Below the first layer that trains nothing is computed again; above it, once.
    assert again[2] == {0: 1, 1: 1, 2: 2, 3: 2}


def test_a_layer_keeps_its_input_only_and_none_below_the_first_that_trains() -> None:
    model = model_of("qwen3_moe", {1: [1, 3]})
    before = step(model)[3]
    assert before.keys() == {1, 2, 3}
    recompute_layers(model)
    hidden = batches(1)[0].numel() * HIDDEN * 4
    # transformers 5.17 keeps a layer's input before the hooks that tell the layer are called.
    assert step(model)[3] in ({1: hidden, 2: hidden, 3: hidden}, {})
    assert min(before[2], before[3]) > 5 * hidden


def test_nothing_is_saved_below_the_first_layer_that_trains() -> None:
    model = model_of("qwen3_moe", {3: [0]})
    recompute_layers(model)
    reached: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda _m, _a, output, number=number: (
                reached.append(number) if output.requires_grad else None
            )
        )
    step(model)
    assert set(reached) == {3}


def test_every_nth_layer() -> None:
    model = model_of("qwen3_moe", {0: [1]})
    recompute_layers(model, {"every_n_layers": 2})
    assert step(model)[2] == {0: 2, 1: 1, 2: 2, 3: 1}


def test_the_reentrant_way_is_refused() -> None:
    model = model_of("qwen3_moe", {0: [1]})
    with pytest.raises(RecipeError, match="use_reentrant: true computes no gradient for a layer"):
        recompute_layers(model, {"use_reentrant": True})

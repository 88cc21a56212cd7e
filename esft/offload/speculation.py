"""Which experts layers to come will probably need: their routers, applied too early.

A hidden state changes little from one layer to the next, so that a later layer's router chooses
much the same experts from the state at hand. Source: Eliseev and Mazur, "Fast Inference of
Mixture-of-Experts Language Models with Offloading", arXiv 2312.17238, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esft.moe import MoeLayer
from esft.offload.cache import ExpertCache
from esft.offload.figures import OffloadFigures


class Speculation:
    """Guesses experts, has them fetched, and counts what the guesses were worth."""

    def __init__(
        self, layers: Sequence[MoeLayer], cache: ExpertCache, ahead: int, figures: OffloadFigures
    ) -> None:
        """Watch the routers.

        Args:
            layers: by position.
            cache: where guesses are sent.
            ahead: how many layers are guessed for at a time; 0 for none.
            figures: are added to.
        """
        self._layers, self._cache, self._ahead, self._figures = layers, cache, ahead, figures
        self._guesses: dict[int, set[int]] = {}
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._hooks = [
            layer.router.register_forward_pre_hook(partial(self._remember, place), with_kwargs=True)
            for place, layer in enumerate(layers)
            if ahead and layer.router is not None
        ]

    def look_ahead(self, place: int) -> None:
        """Guess for the layers after one whose router has just run."""
        call = self._calls.pop(place, None)
        if call is None:
            return
        for target in range(place + 1, min(place + 1 + self._ahead, len(self._layers))):
            experts = self._choose(self._layers[target], *call)
            if experts:
                self._guesses.setdefault(target, set()).update(experts)
                self._cache.guess(target, experts)

    def judge(self, place: int, needed: Sequence[int]) -> None:
        """Compare what was guessed for a layer with what it needs."""
        guesses = self._guesses.pop(place, None)
        if guesses is not None:
            self._figures.now.guessable += len(needed)
            self._figures.now.guessed += len(guesses.intersection(needed))

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()
        self._calls.clear()

    def _remember(
        self, place: int, _router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._calls[place] = args, kwargs

    def _choose(
        self, layer: MoeLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[int] | None:
        """Return the experts that a layer's router would choose, the most chosen first.

        None where it takes or returns something else than the routers before it do: then there
        is nothing to guess with.
        """
        if layer.router is None:
            return None
        try:
            # Not called as a module: whatever watches routers must not see this.
            with torch.no_grad():
                output = layer.router.forward(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError):
            return None
        index = _chosen(output, layer)
        if index is None:
            return None
        chosen = index[(index >= 0) & (index < layer.num_experts)]
        ids, counts = chosen.unique(return_counts=True)
        return ids[counts.argsort(descending=True, stable=True)].tolist()


def _chosen(output: Any, layer: MoeLayer) -> Tensor | None:
    """Find ids `[.., K]` in what a router returns, or the best of its logits `[.., E]`."""
    found = output if isinstance(output, tuple) else (output,)
    tensors = [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.dim()]
    for tensor in tensors:
        if not tensor.is_floating_point() and tensor.shape[-1] == layer.top_k:
            return tensor
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.shape[-1] == layer.num_experts:
            return tensor.topk(layer.top_k, dim=-1).indices
    return None

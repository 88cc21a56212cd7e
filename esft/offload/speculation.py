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
        """Return the experts that a layer's router would choose, by what it would give them.

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
        found = _chosen(output, layer)
        if found is None:
            return None
        index, weight = found
        real = (index >= 0) & (index < layer.num_experts)
        likely = torch.zeros(layer.num_experts, device=index.device)
        likely.index_add_(0, index[real], weight[real].float())
        order = likely.argsort(descending=True, stable=True)
        return order[: int(likely.count_nonzero())].tolist()


def _chosen(output: Any, layer: MoeLayer) -> tuple[Tensor, Tensor] | None:
    """Find ids `[.., K]` and their weights in what a router returns, or the best of its logits."""
    outputs = output if isinstance(output, tuple) else (output,)
    tensors = [tensor for tensor in outputs if isinstance(tensor, Tensor) and tensor.dim()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    for index in tensors:
        if not index.is_floating_point() and index.shape[-1] == layer.top_k:
            weight = next((t for t in floats if t.shape == index.shape), None)
            return index, torch.ones_like(index) if weight is None else weight
    for logits in floats:
        if logits.shape[-1] == layer.num_experts:
            best = logits.topk(layer.top_k, dim=-1)
            return best.indices, best.values.softmax(-1)
    return None

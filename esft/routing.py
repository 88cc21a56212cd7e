"""Sums of what a model's routers decide, taken while it runs.

A hook on each layer, placed by its layout, sees the chosen experts and their weights, whatever the
router looks like. It adds to sums on the device and nothing else: no record of tokens, no wait for
the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from esft.errors import ModelError
from esft.moe import MoeLayer
from esft.scores import LayerScores

HALVES = 2
NOT_COUNTED = 2  # the half of tokens that are in neither
PARTS = 32  # of a sample: processes share them out, each at most one


class Watcher(Protocol):
    """Is shown every choice that `RoutingSums` adds up."""

    def add(self, layer: MoeLayer, half_T: Tensor, index_TK: Tensor) -> None:
        """Take a batch of a layer's choices, on the layer's device.

        Args:
            layer: who chose.
            half_T: 0, 1 or `NOT_COUNTED`, `[T]`.
            index_TK: expert ids, `[T, K]`; E where the router chose no real expert.
        """


class RoutingSums:
    """Sums over the tokens of each half of a sample, in float64 on the devices of the layers.

    They are kept apart by part of the sample until the end: sums of floats depend on their order,
    and so they are the same to the last bit whichever processes counted which parts.

    Attributes:
        by_layer: the sums by layer index: counts and gates, `[PARTS, 2, 3 * (E + 1)]`.
        half_T: of the batch at hand: 0, 1, or `NOT_COUNTED` for each of its B*S tokens, `[T]`.
            Set it before each forward call inside `hooked`.
        part: of the sample that the batch at hand is in, less than `PARTS`; likewise.
    """

    def __init__(self, layers: Sequence[MoeLayer], watchers: Sequence[Watcher] = ()) -> None:
        self._layers = layers
        self._watchers = watchers
        self.by_layer: dict[int, Tensor] = {}
        self.half_T = torch.zeros(0, dtype=torch.int64)
        self.part = 0

    def zeros(self, layer: MoeLayer, device: torch.device) -> Tensor:
        """Return a layer's sums over nothing."""
        shape = (PARTS, 2, (HALVES + 1) * (layer.num_experts + 1))
        return torch.zeros(shape, dtype=torch.float64, device=device)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Add up what the routers decide while the block runs.

        Raises:
            ModelError: a router does not choose K experts for each token.
        """
        handles = [layer.layout.observe(partial(self._add, layer)) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, layer: MoeLayer, index: Tensor, weight: Tensor) -> None:
        """Add a batch: expert ids and weights, `[T, K]` or `[B, S, K]`. Never waits for a GPU."""
        E, K = layer.num_experts, index.shape[-1]
        half_T = self.half_T.to(index.device, non_blocking=True)
        if index.numel() != half_T.numel() * K or layer.top_k != K:
            raise ModelError(
                f"{layer.name}: expected {layer.top_k} experts for each of {half_T.numel()} "
                f"tokens, but its router chose {list(index.shape)}; this family cannot be profiled"
            )
        index_TK = index.reshape(-1, K)
        # Some routers send tokens to experts that do not exist: "no expert", or "the input
        # itself". Those go to a column of their own, which `scores` refuses but where it is known.
        column_TK = torch.where((index_TK >= 0) & (index_TK < E), index_TK, E)
        slot_N = (half_T[:, None] * (E + 1) + column_TK).flatten()
        gate_N = weight.reshape(-1).to(torch.float64) / layer.gate_scale
        if layer.index not in self.by_layer:
            self.by_layer[layer.index] = self.zeros(layer, index.device)
        counts, gates = self.by_layer[layer.index][self.part]
        counts.scatter_add_(0, slot_N, torch.ones_like(gate_N))
        gates.scatter_add_(0, slot_N, gate_N)
        for watcher in self._watchers:
            watcher.add(layer, half_T, column_TK)

    def scores(self, halves: Sequence[int], tokens: int) -> dict[int, LayerScores]:
        """Return the scores, by layer index, over one or both halves.

        A layer that runs several times in a forward pass is scored over all of its uses: each
        counts as tokens of its own. Where a router may choose something that is no expert, those
        choices count as such: what a layer's `token` scores lack to a sum of 1 is their share.

        Args:
            halves: 0, 1 or both.
            tokens: how many counted tokens these have.

        Raises:
            ModelError: a layer was not called, or chose experts that it does not have.
        """
        layers = {}
        for layer in self._layers:
            E, K = layer.num_experts, layer.top_k
            if layer.index not in self.by_layer:
                raise ModelError(f"{layer.name}: never called; this family cannot be profiled")
            bins = _in_order(self.by_layer[layer.index].cpu()).view(2, HALVES + 1, E + 1)
            counts, gates = bins[:, list(halves)].sum(dim=1)
            chosen = int(counts.sum())
            if counts[E] and not layer.layout.others:
                raise ModelError(
                    f"{layer.name}: {int(counts[E]):,} of {chosen:,} choices of its router are "
                    f"none of its {E} experts; this family cannot be profiled"
                )
            if counts[E] == chosen:
                raise ModelError(
                    f"{layer.name}: its router chose none of its experts for any of {tokens:,} "
                    f"tokens; take a larger sample"
                )
            if chosen % (tokens * K):
                raise ModelError(
                    f"{layer.name}: its router chose {chosen:,} experts for {tokens:,} "
                    f"tokens, not {K} each; this family cannot be profiled"
                )
            counted = chosen // K
            layers[layer.index] = LayerScores(
                experts=E,
                top_k=K,
                tokens=counted,
                token=(counts[:E] / chosen).tolist(),
                gate=(gates[:E] / counted).tolist(),
            )
        return layers


def _in_order(parts: Tensor) -> Tensor:
    """Add parts up from the first to the last, which `sum` does not promise."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total

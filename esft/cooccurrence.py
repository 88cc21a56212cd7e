"""How often two experts of a layer serve the same token, counted while a model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from esft.moe import MoeLayer
from esft.routing import NOT_COUNTED


class Cooccurrence:
    """Counts, per layer, the tokens whose K experts hold both of a pair: `[E, E]`, symmetric.

    A watcher of `esft.routing.RoutingSums`. It costs a product of `[E, T]` and `[T, E]` a layer.

    Attributes:
        by_layer: the counts by layer index: `[E, E]`, float64.
    """

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor] = {}

    def zeros(self, layer: MoeLayer, device: torch.device) -> Tensor:
        """Return a layer's counts of nothing."""
        E = layer.num_experts
        return torch.zeros(E, E, dtype=torch.float64, device=device)

    def add(self, layer: MoeLayer, half_T: Tensor, index_TK: Tensor) -> None:
        """Count a layer's choices, see `esft.routing.Watcher`."""
        E = layer.num_experts
        chosen_TE = torch.zeros(len(index_TK), E + 1, device=index_TK.device)
        chosen_TE.scatter_(
            1, index_TK, (half_T != NOT_COUNTED).float()[:, None].expand_as(index_TK)
        )
        if layer.index not in self.by_layer:
            self.by_layer[layer.index] = self.zeros(layer, index_TK.device)
        # Ones and zeros: float32 counts them exactly up to 16 million tokens in a batch.
        chosen_TE = chosen_TE[:, :E]
        self.by_layer[layer.index] += chosen_TE.T @ chosen_TE

    def counts(self, layer: MoeLayer) -> list[list[int]]:
        """Return a layer's counts, `[E][E]`; on the diagonal how many tokens chose the expert."""
        found: list[list[int]] = self.by_layer[layer.index].to(torch.int64).tolist()
        return found

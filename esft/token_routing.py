"""How far the id of a token alone decides where it is routed, counted while a model runs.

OpenMoE (arXiv 2402.01739, section 4) calls it context-independent specialisation: its routers send
a token id to the same experts whatever the text around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from esft.diagnostics import FixedByToken
from esft.moe import MoeLayer
from esft.routing import HALVES, NOT_COUNTED

MIN_SEEN = 8  # counted tokens of an id in each half of the sample
MOST_IDS = 2048  # the most frequent ones: 8 bytes for each of them, each expert and each layer


class TokenRouting:
    """Counts, per layer, how often each frequent token id chose each expert; per half.

    A watcher of `esft.routing.RoutingSums`. Call `batch` before each forward call.

    Attributes:
        by_layer: the counts by layer index: `[2, ids, E + 1]`, flat, int32.
    """

    def __init__(self, ids: Sequence[Sequence[int]], halves: Sequence[Sequence[int]]) -> None:
        """Find the ids worth counting.

        Args:
            ids: the sample's rows of token ids.
            halves: for each of these tokens 0, 1 or `NOT_COUNTED`.
        """
        seen: list[Counter[int]] = [Counter() for _ in range(HALVES + 1)]
        for row, half in zip(ids, halves, strict=True):
            for token, part in zip(row, half, strict=True):
                seen[part][token] += 1
        often = [
            token
            for token, count in seen[0].items()
            if count >= MIN_SEEN and seen[1][token] >= MIN_SEEN
        ]
        often.sort(key=lambda token: (-seen[0][token] - seen[1][token], token))
        self.token_ids = often[:MOST_IDS]
        self.tokens = sum(seen[half][token] for half in range(HALVES) for token in self.token_ids)
        self._row_V = torch.full((1 + max((max(row) for row in ids if row), default=0),), -1)
        self._row_V[self.token_ids] = torch.arange(len(self.token_ids))
        self.by_layer: dict[int, Tensor] = {}
        self._place_P = self._row_P = torch.zeros(0, dtype=torch.int64)

    def zeros(self, layer: MoeLayer, device: torch.device) -> Tensor:
        """Return a layer's counts of nothing."""
        cells = HALVES * len(self.token_ids) * (layer.num_experts + 1)
        return torch.zeros(cells, dtype=torch.int32, device=device)

    def batch(self, ids_BS: Tensor, half_T: Tensor) -> None:
        """Say what comes next: token ids `[B, S]` and their halves `[B * S]`, on the CPU."""
        row_T = self._row_V[ids_BS.flatten()]
        # Chosen here, on the CPU, so that no layer waits for a device.
        self._place_P = ((row_T >= 0) & (half_T != NOT_COUNTED)).nonzero().squeeze(1)
        self._row_P = (half_T * len(self.token_ids) + row_T)[self._place_P]

    def add(self, layer: MoeLayer, half_T: Tensor, index_TK: Tensor) -> None:
        """Count a layer's choices, see `esft.routing.Watcher`."""
        if not self.token_ids:
            return
        columns, device = layer.num_experts + 1, index_TK.device
        place_P, row_P = self._place_P.to(device), self._row_P.to(device)
        if layer.index not in self.by_layer:
            self.by_layer[layer.index] = self.zeros(layer, device)
        cell_N = (row_P[:, None] * columns + index_TK[place_P]).flatten()
        one_N = torch.ones((), dtype=torch.int32, device=device).expand(len(cell_N))
        self.by_layer[layer.index].scatter_add_(0, cell_N, one_N)

    def fixed(self, layer: MoeLayer) -> FixedByToken | None:
        """Return a layer's figures, or None if no id was seen `MIN_SEEN` times in both halves.

        The majority experts of an id v are found in one half of the sample and looked for in the
        other, so that rare ids do not seem fixed by chance:

            share = sum_h sum_v sum_{i in M(v, 1-h)} c(h, v, i) / sum_h sum_v sum_i c(h, v, i)

        where `c(h, v, i)` is how often tokens with id v in half h chose expert i, and `M(v, h)`
        are the K experts with the highest `c(h, v, .)`, ties to the lower id. `without_id` is the
        same with all ids counted as one. Ids that always stand in the same text (a template that
        every row begins with) count as fixed.
        """
        if layer.index not in self.by_layer:
            return None
        shape = (HALVES, len(self.token_ids), layer.num_experts + 1)
        table_HVE = self.by_layer[layer.index].cpu().view(shape)[..., :-1].to(torch.int64)
        return FixedByToken(
            share=_found_again(table_HVE, layer.top_k),
            without_id=_found_again(table_HVE.sum(dim=1, keepdim=True), layer.top_k),
            token_ids=len(self.token_ids),
            tokens=self.tokens,
        )


def _found_again(table_HVE: Tensor, top_k: int) -> float:
    """Return the share of one half's choices on the majority experts of the other, both ways."""
    majority = table_HVE.flip(0).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return int(table_HVE.gather(-1, majority).sum()) / int(table_HVE.sum())

"""The oracle of `route`: plain Python lists."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.rows import ELSEWHERE, NO_EXPERT, Rows, tile_bound


def route(topk_index: Tensor, slot: Tensor, block_m: int) -> Rows:
    """Sort the routed rows by slot, ties by position, and cut each slot's into tiles.

    Args:
        topk_index: `[T, K]` expert ids; -1 and E stand for an expert held elsewhere.
        slot: `[E]`, expert id -> slot.
        block_m: rows of a tile.
    """
    E = slot.shape[0]
    ids, slots = topk_index.reshape(-1).tolist(), slot.tolist()
    key = [slots[e] if 0 <= e < E else E for e in ids]
    flat = sorted(range(len(ids)), key=key.__getitem__)
    place = [0] * len(ids)
    for row, position in enumerate(flat):
        valid = 0 <= ids[position] < E
        place[position] = row if valid else ELSEWHERE if ids[position] in (-1, E) else NO_EXPERT
    offsets = [sum(k < s for k in key) for s in range(E + 1)]
    tiles = [(s, row) for s in range(E) for row in range(offsets[s], offsets[s + 1], block_m)]
    tiles += [(E, 0)] * (tile_bound(len(ids), E, block_m) - len(tiles))

    def as_tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=topk_index.device)

    return Rows(
        flat=as_tensor(flat),
        token=as_tensor([position // topk_index.shape[1] for position in flat]),
        place=as_tensor(place).view(topk_index.shape),
        offsets=as_tensor(offsets),
        tile_slot=as_tensor([s for s, _ in tiles]),
        tile_row=as_tensor([row for _, row in tiles]),
        block_m=block_m,
    )

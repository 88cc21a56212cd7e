"""The oracle of `route`: plain Python lists."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.rows import ELSEWHERE, NO_EXPERT, Rows, tile_bound


def route(topk_index: Tensor, slot: Tensor, block_m: int, num_slots: int | None = None) -> Rows:
    """Sort the routed rows by slot, ties by position, and cut each slot's into tiles.

    Args:
        topk_index: `[T, K]` expert ids; -1 and E stand for an expert held elsewhere.
        slot: `[E]`, expert id -> slot.
        block_m: rows of a tile.
        num_slots: S, where it is not E.
    """
    E = slot.shape[0]
    S = num_slots or E
    ids, slots = topk_index.reshape(-1).tolist(), slot.tolist()
    key = [slots[e] if 0 <= e < E else S for e in ids]
    flat = sorted(range(len(ids)), key=key.__getitem__)
    place = [0] * len(ids)
    for row, position in enumerate(flat):
        valid = 0 <= ids[position] < E
        place[position] = row if valid else ELSEWHERE if ids[position] in (-1, E) else NO_EXPERT
    offsets = [sum(k < s for k in key) for s in range(S + 1)]
    tiles = [(s, row) for s in range(S) for row in range(offsets[s], offsets[s + 1], block_m)]
    tiles += [(S, 0)] * (tile_bound(len(ids), S, block_m) - len(tiles))

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

"""`route` without a host sync: PyTorch's stable sort between small Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.rows import ELSEWHERE, NO_EXPERT, Rows, tile_bound

_ELSEWHERE = tl.constexpr(ELSEWHERE)
_NO_EXPERT = tl.constexpr(NO_EXPERT)
_BLOCK = 1024
_TILES = 16  # times the slots, in registers: 512 of them must fit


def route(topk_index: Tensor, slot: Tensor, block_m: int, num_slots: int | None = None) -> Rows:
    """Sort the routed rows by slot, ties by position, and cut each slot's into tiles.

    Args:
        topk_index: `[T, K]` int64 or int32 expert ids; -1 and E stand for an expert held
            elsewhere. Other ids that name no expert are marked in `Rows.place`.
        slot: `[E]` int64, expert id -> slot.
        block_m: rows of a tile.
        num_slots: S, where it is not E.
    """
    (E,), N = slot.shape, topk_index.numel()
    S = num_slots or E
    # `reshape` alone may return a view with gaps.
    ids, slot = topk_index.reshape(-1).contiguous(), slot.contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids.device)

    key = empty(N)
    blocks = (triton.cdiv(N, _BLOCK),)
    _keys[blocks](ids, slot, key, N, E=E, S=S, BLOCK=_BLOCK)
    sorted_key, order = torch.sort(key, stable=True)
    slots = torch.arange(S + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(sorted_key, slots, out_int32=True)
    flat, token, place = empty(N), empty(N), empty(*topk_index.shape)
    _rows[blocks](
        ids, order, sorted_key, flat, token, place, N,
        K=topk_index.shape[1], E=E, S=S, BLOCK=_BLOCK,
    )  # fmt: skip
    tiles = tile_bound(N, S, block_m)
    tile_slot, tile_row = empty(tiles), empty(tiles)
    _tiles[(triton.cdiv(tiles, _TILES),)](
        offsets, tile_slot, tile_row, tiles,
        S=S, BM=block_m, BLOCK=_TILES, SLOTS=triton.next_power_of_2(S),
    )  # fmt: skip
    return Rows(flat, token, place, offsets, tile_slot, tile_row, block_m)


@triton.jit
def _keys(IDS, SLOT, KEY, N, E: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(IDS + r, mask=r < N, other=-1)
    held = (ids >= 0) & (ids < E)
    key = tl.load(SLOT + ids, mask=held, other=S)
    # A slot out of range would make other kernels read out of bounds.
    key = tl.where((key >= 0) & (key < S), key, S)
    tl.store(KEY + r, key.to(tl.int32), mask=r < N)


@triton.jit
def _rows(
    IDS, ORDER, SORTED_KEY, FLAT, TOKEN, PLACE, N,
    K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    flat = tl.load(ORDER + r, mask=r < N, other=0).to(tl.int32)
    key = tl.load(SORTED_KEY + r, mask=r < N, other=0)
    ids = tl.load(IDS + flat, mask=r < N, other=0)
    absent = tl.where((ids == -1) | (ids == E), _ELSEWHERE, _NO_EXPERT)
    tl.store(FLAT + r, flat, mask=r < N)
    tl.store(TOKEN + r, flat // K, mask=r < N)
    tl.store(PLACE + flat, tl.where(key < S, r, absent), mask=r < N)


@triton.jit
def _tiles(
    OFFSETS, TILE_SLOT, TILE_ROW, TILES,
    S: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, SLOTS)
    first = tl.load(OFFSETS + s, mask=s < S, other=0)
    last = tl.load(OFFSETS + s + 1, mask=s < S, other=0)
    count = (last - first + BM - 1) // BM
    end = tl.cumsum(count, 0)  # where each slot's tiles end in the list
    begins = end - count
    # Tile j is of the one slot whose tiles begin at or before j and end after it.
    mine = (begins[None, :] <= j[:, None]) & (j[:, None] < end[None, :])
    used = tl.sum(mine.to(tl.int32), axis=1) > 0
    slot = tl.sum(tl.where(mine, s[None, :], 0), axis=1)
    row = tl.sum(tl.where(mine, first[None, :] + (j[:, None] - begins[None, :]) * BM, 0), axis=1)
    tl.store(TILE_SLOT + j, tl.where(used, slot, S), mask=j < TILES)
    tl.store(TILE_ROW + j, row, mask=j < TILES)

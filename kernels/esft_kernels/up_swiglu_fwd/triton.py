"""`up_swiglu_fwd` as one kernel: gather, both halves' products and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import Matrices
from esft_kernels.blocks import dot, expert_matrix, store_halves, tile
from esft_kernels.parts import parts
from esft_kernels.rows import Rows


def up_swiglu_fwd(
    x: Tensor, up: Matrices, rows: Rows, activation: SwiGLU, config: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Gather each routed row's token, multiply by its expert's matrix, apply SwiGLU.

    Args:
        x: `[T, H]`, contiguous.
        up: `[.., H, 2I]`, no biases, both banks with the same inner strides.
        rows: how rows are sorted.
        activation: where the halves stand in the 2I columns.
        config: BN (columns of a tile's half), BK, num_warps, num_stages.

    Returns:
        z `[N, 2I]` and a `[N, I]`, sorted by slot; rows without an expert are left unwritten.
    """
    N, H = rows.flat.shape[0], x.shape[1]
    I = up.frozen.shape[-1] // 2  # noqa: E741
    z, a = x.new_empty(N, 2 * I), x.new_empty(N, I)
    for part in parts(up, rows):
        _up_swiglu_fwd[(triton.cdiv(I, config["BN"]) * rows.num_tiles,)](
            x, part.trainable, part.frozen, z, a,
            rows.token, rows.offsets, rows.tile_slot, rows.tile_row, *part.slots,
            H=H, I=I, **part.strides, INTERLEAVED=activation.interleaved,
            BM=rows.block_m, **config,
        )  # fmt: skip
    return z, a


@triton.jit(do_not_specialize=["first", "n_sel", "end"])
def _up_swiglu_fwd(
    X, W_TRAIN, W_FROZEN, Z, A, TOKEN, OFFSETS, TILE_SLOT, TILE_ROW, first, n_sel, end,
    H: tl.constexpr, I: tl.constexpr,  # noqa: E741
    STRIDE_T: tl.constexpr, STRIDE_F: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pn, pm = tile(tl.cdiv(I, BN))
    slot = tl.load(TILE_SLOT + pm)
    if (slot < first) | (slot >= end):
        return
    row0 = tl.load(TILE_ROW + pm)
    loc = tl.arange(0, BM)
    row_mask = row0 + loc < tl.load(OFFSETS + slot + 1)
    token = tl.load(TOKEN + row0 + loc, mask=row_mask, other=0).to(tl.int64)
    W = expert_matrix(W_TRAIN, W_FROZEN, slot, n_sel, STRIDE_T, STRIDE_F)
    n = pn * BN + tl.arange(0, BN)
    n_mask = n < I
    k = tl.arange(0, BK)
    # Where gate j and up j stand among the 2I columns: at `j * STEP` and `j * STEP + UP`.
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    UP: tl.constexpr = 1 if INTERLEAVED else I
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, H, BK):
        k_mask = (k0 + k) < H
        x = tl.load(
            X + token[:, None] * H + (k0 + k)[None, :],
            mask=row_mask[:, None] & k_mask[None, :],
            other=0.0,
        )
        w = W + (k0 + k)[:, None] * W_K + n[None, :] * (STEP * W_N)
        w_mask = k_mask[:, None] & n_mask[None, :]
        gate = dot(x, tl.load(w, mask=w_mask, other=0.0), gate)
        up = dot(x, tl.load(w + UP * W_N, mask=w_mask, other=0.0), up)
    # A 64-bit base and 32-bit offsets within the tile: no overflow, and few registers.
    base = row0.to(tl.int64)
    store_halves(Z + base * (2 * I), loc, row_mask, pn * BN, gate, up, I, INTERLEAVED, BN)
    a = gate * tl.sigmoid(gate) * up
    tl.store(
        A + base * I + loc[:, None] * I + n[None, :],
        a.to(A.dtype.element_ty),
        mask=row_mask[:, None] & n_mask[None, :],
    )

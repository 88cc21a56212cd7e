"""`grouped_gemm` over two banks in one launch."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.bank import Matrices
from esft_kernels.blocks import expert_matrix, multiply, tile
from esft_kernels.parts import parts
from esft_kernels.rows import Rows


def grouped_gemm(
    x: Tensor,
    matrices: Matrices,
    rows: Rows,
    *,
    gather: bool,
    config: Mapping[str, int],
    slots: int | None = None,
) -> Tensor:
    """Multiply each row by its expert's matrix and add the bias, if there is one.

    Args:
        x: `[T, in]` with `gather`, else `[N, in]`, sorted by slot; contiguous.
        matrices: `[.., in, out]`, both banks with the same inner strides.
        rows: how rows are sorted.
        gather: whether a row of x is a token's instead of a routed row's.
        config: BN, BK, num_warps, num_stages.
        slots: only rows of slots below this are computed; default all.

    Returns:
        `[N, out]`; rows without an expert are left unwritten.
    """
    out = matrices.frozen.shape[-1]
    y = x.new_empty(rows.flat.shape[0], out)
    has_bias = matrices.frozen_bias is not None
    for part in parts(matrices, rows, slots):
        # Without a bias any pointer does: the kernel does not look.
        biases = (part.trainable_bias, part.frozen_bias) if has_bias else (x, x)
        _grouped_gemm[(triton.cdiv(out, config["BN"]) * rows.num_tiles,)](
            x, part.trainable, part.frozen, *biases, y,
            rows.token, rows.offsets, rows.tile_slot, rows.tile_row, *part.slots,
            K=x.shape[1], N=out, **part.strides,
            GATHER=gather, BIAS=has_bias, BM=rows.block_m, **config,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["first", "n_sel", "end"])
def _grouped_gemm(
    X, W_TRAIN, W_FROZEN, B_TRAIN, B_FROZEN, Y, TOKEN, OFFSETS, TILE_SLOT, TILE_ROW,
    first, n_sel, end,
    K: tl.constexpr, N: tl.constexpr,
    STRIDE_T: tl.constexpr, STRIDE_F: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pn, pm = tile(tl.cdiv(N, BN))
    slot = tl.load(TILE_SLOT + pm)
    if (slot < first) | (slot >= end):
        return
    row0 = tl.load(TILE_ROW + pm)
    loc = tl.arange(0, BM)
    row_mask = row0 + loc < tl.load(OFFSETS + slot + 1)
    if GATHER:
        x_rows = X + tl.load(TOKEN + row0 + loc, mask=row_mask, other=0).to(tl.int64) * K
    else:
        x_rows = X + row0.to(tl.int64) * K + loc * K
    W = expert_matrix(W_TRAIN, W_FROZEN, slot, n_sel, STRIDE_T, STRIDE_F)
    n = pn * BN + tl.arange(0, BN)
    n_mask = n < N
    acc = multiply(x_rows, row_mask, W, n, n_mask, K, W_K, W_N, BM, BN, BK)
    if BIAS:
        bias = expert_matrix(B_TRAIN, B_FROZEN, slot, n_sel, N, N)
        acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    Y += row0.to(tl.int64) * N
    tl.store(
        Y + loc[:, None] * N + n[None, :],
        acc.to(Y.dtype.element_ty),
        mask=row_mask[:, None] & n_mask[None, :],
    )

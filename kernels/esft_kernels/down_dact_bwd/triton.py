"""`down_dact_bwd` as one kernel: gather, product, and SwiGLU's backward on the accumulator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import Matrices
from esft_kernels.blocks import expert_matrix, load_halves, multiply, store_halves, tile
from esft_kernels.parts import parts
from esft_kernels.rows import Rows


def down_dact_bwd(
    d_out: Tensor,
    down: Matrices,
    z: Tensor,
    weight: Tensor,
    rows: Rows,
    activation: SwiGLU,
    config: Mapping[str, int],
    slots: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the weighted sum, the down projection and SwiGLU.

    With `a = silu(gate) * up` and `da = W2 d_out`, unweighted: the gradient of a row's weight is
    `<d_out, W2^T a> = <da, a>`, so that the expert's output is not needed.

    Args:
        d_out: `[T, H]`, contiguous.
        down: `[.., I, H]`, both banks with the same inner strides.
        z: `[N, 2I]`, the up projection's output, sorted by slot, contiguous.
        weight: `[T, K]`, contiguous.
        rows: how rows are sorted.
        activation: where the halves stand in the 2I columns.
        config: BN, BK, SPLIT (into how many parts the epilogue cuts a tile: a whole one would not
            fit the registers), num_warps, num_stages.
        slots: only rows of slots below this are computed; default all.

    Returns:
        dz `[N, 2I]`, sorted by slot; `weight * a` `[N, I]` of the trainable bank's rows, the
        others left unwritten (`[0, I]` where none trains); and the gradient of weight, `[T, K]`
        fp32, 0 for rows that were not computed.
    """
    N, H = rows.flat.shape[0], d_out.shape[1]
    n, I = down.trainable.shape[0], z.shape[1] // 2  # noqa: E741
    columns = triton.cdiv(I, config["BN"])
    dz, gated = torch.empty_like(z), z.new_empty(N if n else 0, I)
    # Partial sums, added up in a fixed order: no atomics.
    d_weight = z.new_zeros(columns * config["SPLIT"], *weight.shape, dtype=torch.float32)
    for part in parts(down.transpose(), rows, slots):
        _down_dact_bwd[(columns * rows.num_tiles,)](
            d_out, part.trainable, part.frozen, z, weight, dz, gated, d_weight,
            rows.token, rows.flat, rows.offsets, rows.tile_slot, rows.tile_row, *part.slots, N,
            H=H, I=I, **part.strides, INTERLEAVED=activation.interleaved,
            BM=rows.block_m, **config,
        )  # fmt: skip
    return dz, gated, d_weight.sum(0)


@triton.jit(do_not_specialize=["first", "n_sel", "end", "N"])
def _down_dact_bwd(
    D_OUT, W_TRAIN, W_FROZEN, Z, WEIGHT, DZ, GATED, D_WEIGHT,
    TOKEN, FLAT, OFFSETS, TILE_SLOT, TILE_ROW, first, n_sel, end, N,
    H: tl.constexpr, I: tl.constexpr,  # noqa: E741
    STRIDE_T: tl.constexpr, STRIDE_F: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    pn, pm = tile(tl.cdiv(I, BN))
    slot = tl.load(TILE_SLOT + pm)
    if (slot < first) | (slot >= end):
        return
    row0 = tl.load(TILE_ROW + pm)
    loc = tl.arange(0, BM)
    row_mask = row0 + loc < tl.load(OFFSETS + slot + 1)
    token = tl.load(TOKEN + row0 + loc, mask=row_mask, other=0).to(tl.int64)
    flat = tl.load(FLAT + row0 + loc, mask=row_mask, other=0)
    weight = tl.load(WEIGHT + flat, mask=row_mask, other=0.0).to(tl.float32)
    W = expert_matrix(W_TRAIN, W_FROZEN, slot, n_sel, STRIDE_T, STRIDE_F)
    n = pn * BN + tl.arange(0, BN)
    da = multiply(D_OUT + token * H, row_mask, W, n, n < I, H, W_K, W_N, BM, BN, BK)
    base = row0.to(tl.int64)
    Z += base * (2 * I)
    DZ += base * (2 * I)
    GATED += base * I
    D_WEIGHT += pn.to(tl.int64) * SPLIT * N
    trains = slot < n_sel  # in a later part no slot is: each is at n_sel or above
    if SPLIT == 1:
        _through_swiglu(
            da, pn * BN, loc, row_mask, flat, weight, trains, Z, DZ, GATED, D_WEIGHT,
            I, INTERLEAVED, BN,
        )  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(da, (BM, 2, BN // 2)), (0, 2, 1)))
        _through_swiglu(
            left, pn * BN, loc, row_mask, flat, weight, trains, Z, DZ, GATED, D_WEIGHT,
            I, INTERLEAVED, BN // 2,
        )  # fmt: skip
        _through_swiglu(
            right, pn * BN + BN // 2, loc, row_mask, flat, weight, trains, Z, DZ, GATED,
            D_WEIGHT + N, I, INTERLEAVED, BN // 2,
        )  # fmt: skip


@triton.jit
def _through_swiglu(
    da, n0, loc, row_mask, flat, weight, trains, Z, DZ, GATED, D_WEIGHT,
    I: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr,  # noqa: E741
):  # fmt: skip
    n = n0 + tl.arange(0, BN)
    gate, up = load_halves(Z, loc, row_mask, n0, I, INTERLEAVED, BN)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(D_WEIGHT + flat, tl.sum(da * silu * up, axis=1), mask=row_mask)
    if trains:  # the only experts whose down projection needs weight * a
        gated = (silu * up * weight[:, None]).to(GATED.dtype.element_ty)
        mask = row_mask[:, None] & (n < I)[None, :]
        tl.store(GATED + loc[:, None] * I + n[None, :], gated, mask=mask)
    da *= weight[:, None]
    d_gate = da * up * (sigmoid + silu * (1.0 - sigmoid))
    store_halves(DZ, loc, row_mask, n0, d_gate, da * silu, I, INTERLEAVED, BN)

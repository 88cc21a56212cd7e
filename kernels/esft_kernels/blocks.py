"""Pieces that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bf16 operands and knows no bf16 arithmetic;
# compiled code never sees the branch that this turns on.
_UPCAST = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """Return `acc + a @ b` in fp32; fp32 operands are not rounded to tf32."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505 - a branch that is decided when the kernel is compiled
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def expert_matrix(W_TRAIN, W_FROZEN, slot, n_sel, STRIDE_T: tl.constexpr, STRIDE_F: tl.constexpr):
    """Return where a slot's matrix begins: below n_sel in the trainable bank."""
    if slot < n_sel:
        W = W_TRAIN + slot.to(tl.int64) * STRIDE_T
    else:
        W = W_FROZEN + (slot - n_sel).to(tl.int64) * STRIDE_F
    return W


@triton.jit
def tile(COLUMNS: tl.constexpr):
    """Return this program's column of tiles, and its place in the list of tiles of rows.

    The columns of one tile of rows run together: they share its rows of x in the cache. One axis
    for both, since a GPU takes no more than 65,535 programs along another.
    """
    return tl.program_id(0) % COLUMNS, tl.program_id(0) // COLUMNS


@triton.jit
def multiply(
    x_rows, x_mask, W, n, n_mask, K: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return a tile `[BM, BN]` in fp32 of x @ W.

    `x_rows` `[BM]` points at each row's first of K elements; W has strides (W_K, W_N) and its
    columns `n` `[BN]` are wanted.
    """
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k_mask = (k0 + k) < K
        x = tl.load(
            x_rows[:, None] + (k0 + k)[None, :],
            mask=x_mask[:, None] & k_mask[None, :],
            other=0.0,
        )
        w = tl.load(
            W + (k0 + k)[:, None] * W_K + n[None, :] * W_N,
            mask=n_mask[None, :] & k_mask[:, None],
            other=0.0,
        )
        acc = dot(x, w, acc)
    return acc


@triton.jit
def load_halves(
    Z, loc, row_mask, n0,
    I: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Return gate and up `[BM, BN]` in fp32: columns from n0 of rows `loc` of Z `[.., 2I]`."""
    if INTERLEAVED:
        # Halves in turns come as one block: elements two apart would be loads of two bytes.
        n = 2 * n0 + tl.arange(0, 2 * BN)
        mask = row_mask[:, None] & (n < 2 * I)[None, :]
        z = tl.load(Z + loc[:, None] * (2 * I) + n[None, :], mask=mask, other=0.0)
        gate, up = tl.split(tl.reshape(z, (z.shape[0], BN, 2)))
    else:
        n = n0 + tl.arange(0, BN)
        mask = row_mask[:, None] & (n < I)[None, :]
        offset = loc[:, None] * (2 * I) + n[None, :]
        gate = tl.load(Z + offset, mask=mask, other=0.0)
        up = tl.load(Z + offset + I, mask=mask, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_halves(
    Z, loc, row_mask, n0, gate, up,
    I: tl.constexpr, INTERLEAVED: tl.constexpr, BN: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Store gate and up `[BM, BN]` to where `load_halves` finds them."""
    gate, up = gate.to(Z.dtype.element_ty), up.to(Z.dtype.element_ty)
    if INTERLEAVED:
        n = 2 * n0 + tl.arange(0, 2 * BN)
        mask = row_mask[:, None] & (n < 2 * I)[None, :]
        tl.store(Z + loc[:, None] * (2 * I) + n[None, :], tl.interleave(gate, up), mask=mask)
    else:
        n = n0 + tl.arange(0, BN)
        mask = row_mask[:, None] & (n < I)[None, :]
        offset = loc[:, None] * (2 * I) + n[None, :]
        tl.store(Z + offset, gate, mask=mask)
        tl.store(Z + offset + I, up, mask=mask)

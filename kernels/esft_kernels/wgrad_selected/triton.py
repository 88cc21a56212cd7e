"""`wgrad_selected`: one program owns one tile of one expert's gradient, so that bits repeat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.blocks import dot
from esft_kernels.rows import Rows


def wgrad_selected(
    p: Tensor,
    q: Tensor,
    rows: Rows,
    num_selected: int,
    *,
    gather_p: bool,
    gather_q: bool,
    dtype: torch.dtype,
    config: Mapping[str, int],
) -> Tensor:
    """Sum the outer products of each trainable expert's rows: `dw[s] = P[rows of s].T @ Q[..]`.

    The trainable bank's rows come first, so that no row of a frozen expert is read.

    Args:
        p: `[T, P]` with `gather_p`, else `[N, P]`, sorted by slot; contiguous.
        q: `[T, Q]` with `gather_q`, else `[N, Q]`; contiguous.
        rows: how rows are sorted.
        num_selected: n, at least 1.
        gather_p: whether a row of p is a token's instead of a routed row's.
        gather_q: the same for q.
        dtype: of the result; sums are in fp32.
        config: BP, BQ (the tile), BR (rows of a step), num_warps, num_stages.

    Returns:
        `[n, P, Q]`; zero for an expert without rows.
    """
    P, Q = p.shape[1], q.shape[1]
    dw = torch.empty(num_selected, P, Q, dtype=dtype, device=p.device)
    grid = (triton.cdiv(Q, config["BQ"]), triton.cdiv(P, config["BP"]), num_selected)
    _wgrad_selected[grid](
        p, q, dw, rows.token, rows.offsets,
        P=P, Q=Q, GATHER_P=gather_p, GATHER_Q=gather_q, **config,
    )  # fmt: skip
    return dw


@triton.jit
def _wgrad_selected(
    LEFT, RIGHT, DW, TOKEN, OFFSETS,
    P: tl.constexpr, Q: tl.constexpr, GATHER_P: tl.constexpr, GATHER_Q: tl.constexpr,
    BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(2)
    begin = tl.load(OFFSETS + slot)
    end = tl.load(OFFSETS + slot + 1)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    p_mask, q_mask = p < P, q < Q
    acc = tl.zeros((BP, BQ), tl.float32)
    for r0 in range(begin, end, BR):
        r = r0 + tl.arange(0, BR)
        r_mask = r < end
        left, right = r.to(tl.int64), r.to(tl.int64)
        if GATHER_P:
            left = tl.load(TOKEN + r, mask=r_mask, other=0).to(tl.int64)
        if GATHER_Q:
            right = tl.load(TOKEN + r, mask=r_mask, other=0).to(tl.int64)
        a = tl.load(
            LEFT + left[:, None] * P + p[None, :], mask=r_mask[:, None] & p_mask[None, :], other=0.0
        )
        b = tl.load(
            RIGHT + right[:, None] * Q + q[None, :],
            mask=r_mask[:, None] & q_mask[None, :],
            other=0.0,
        )
        acc = dot(tl.trans(a), b, acc)
    DW += slot.to(tl.int64) * (P * Q)
    # Written for an expert without rows too: zeros.
    tl.store(
        DW + p[:, None] * Q + q[None, :],
        acc.to(DW.dtype.element_ty),
        mask=p_mask[:, None] & q_mask[None, :],
    )

"""`gather_sum` in one pass over the rows; fp32 sums in the order of k, no atomics."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.rows import NO_EXPERT, Rows

_NO_EXPERT = tl.constexpr(NO_EXPERT)


def gather_sum(
    y: Tensor, rows: Rows, weight: Tensor | None = None, *, config: Mapping[str, int]
) -> Tensor:
    """Add up each token's rows: `out[t] = sum_k weight[t, k] * y[place[t, k]]`.

    Args:
        y: `[N, H]`, sorted by slot, contiguous.
        rows: how rows are sorted.
        weight: `[T, K]` contiguous, or None for ones.
        config: BT (tokens of a tile), BH (columns), num_warps, num_stages.

    Returns:
        `[T, H]` in y's dtype. A row whose expert is held elsewhere adds nothing; one whose id
        names no expert makes its token NaN.
    """
    (T, K), H = rows.place.shape, y.shape[1]
    out = y.new_empty(T, H)
    _gather_sum[(triton.cdiv(T, config["BT"]), triton.cdiv(H, config["BH"]))](
        y, y if weight is None else weight, rows.place, out, T,
        H=H, K=K, WEIGHTED=weight is not None, **config,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T"])
def _gather_sum(
    Y, WEIGHT, PLACE, OUT, T,
    H: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    t_mask, h_mask = t < T, h < H
    acc = tl.zeros((BT, BH), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(PLACE + t * K + k, mask=t_mask, other=-1)
        y = tl.load(
            Y + row.to(tl.int64)[:, None] * H + h[None, :],
            mask=(row >= 0)[:, None] & h_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            # Not even a NaN of a row that is held elsewhere counts.
            y *= tl.load(WEIGHT + t * K + k, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        acc += tl.where(row == _NO_EXPERT, float("nan"), 0.0)[:, None] + y
    tl.store(
        OUT + t[:, None] * H + h[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=t_mask[:, None] & h_mask[None, :],
    )

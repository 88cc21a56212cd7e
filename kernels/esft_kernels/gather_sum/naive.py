"""The oracle of `gather_sum`: one token after the other, in any dtype."""

from __future__ import annotations

import math

from torch import Tensor

from esft_kernels.rows import NO_EXPERT, Rows


def gather_sum(y: Tensor, rows: Rows, weight: Tensor | None = None) -> Tensor:
    """Add up each token's rows: `out[t] = sum_k weight[t, k] * y[place[t, k]]`.

    Args:
        y: `[N, H]`, sorted by slot.
        rows: how rows are sorted.
        weight: `[T, K]`, or None for ones.

    Returns:
        `[T, H]`. A row whose expert is held elsewhere adds nothing; one whose id names no expert
        makes its token NaN.
    """
    T, K = rows.place.shape
    out = y.new_zeros(T, y.shape[1])
    for t in range(T):
        for k in range(K):
            row = int(rows.place[t, k])
            if row >= 0:
                out[t] += y[row] if weight is None else y[row] * weight[t, k]
            elif row == NO_EXPERT:
                out[t] = math.nan
    return out

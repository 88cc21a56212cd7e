"""The oracle of `grouped_gemm`: one slot after the other, in any dtype."""

from __future__ import annotations

from torch import Tensor

from esft_kernels.bank import Matrices
from esft_kernels.rows import Rows


def grouped_gemm(x: Tensor, matrices: Matrices, rows: Rows, *, gather: bool) -> Tensor:
    """Multiply each row by its expert's matrix and add the bias, if there is one.

    Args:
        x: `[T, in]` with `gather`, else `[N, in]`, sorted by slot.
        matrices: `[.., in, out]`.
        rows: how rows are sorted.
        gather: whether a row of x is a token's instead of a routed row's.

    Returns:
        `[N, out]`; zero for rows without an expert.
    """
    n = matrices.trainable.shape[0]
    y = x.new_zeros(rows.flat.shape[0], matrices.frozen.shape[-1])
    ends = rows.offsets.tolist()
    for s in range(rows.num_slots):
        own = slice(ends[s], ends[s + 1])
        bank, bias = (
            (matrices.trainable, matrices.trainable_bias)
            if s < n
            else (matrices.frozen, matrices.frozen_bias)
        )
        place = s if s < n else s - n
        y[own] = (x[rows.token[own].long()] if gather else x[own]) @ bank[place]
        if bias is not None:
            y[own] += bias[place]
    return y

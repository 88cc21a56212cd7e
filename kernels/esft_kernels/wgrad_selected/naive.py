"""The oracle of `wgrad_selected`: one trainable expert after the other, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

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
) -> Tensor:
    """Sum the outer products of each trainable expert's rows: `dw[s] = P[rows of s].T @ Q[..]`.

    Args:
        p: `[T, P]` with `gather_p`, else `[N, P]`, sorted by slot.
        q: `[T, Q]` with `gather_q`, else `[N, Q]`.
        rows: how rows are sorted.
        num_selected: n.
        gather_p: whether a row of p is a token's instead of a routed row's.
        gather_q: the same for q.
        dtype: of the result.

    Returns:
        `[n, P, Q]`; zero for an expert without rows.
    """
    dw = torch.zeros(num_selected, p.shape[1], q.shape[1], dtype=dtype, device=p.device)
    ends = rows.offsets.tolist()
    for s in range(num_selected):
        own = slice(ends[s], ends[s + 1])
        token = rows.token[own].long()
        left, right = (p[token] if gather_p else p[own]), (q[token] if gather_q else q[own])
        dw[s] = left.t() @ right
    return dw

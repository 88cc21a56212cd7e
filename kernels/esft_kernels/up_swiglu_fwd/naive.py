"""The oracle of `up_swiglu_fwd`: one slot after the other, in any dtype."""

from __future__ import annotations

from torch import Tensor

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import Matrices
from esft_kernels.grouped_gemm.naive import grouped_gemm
from esft_kernels.rows import Rows


def up_swiglu_fwd(x: Tensor, up: Matrices, rows: Rows, activation: SwiGLU) -> tuple[Tensor, Tensor]:
    """Gather each routed row's token, multiply by its expert's matrix, apply SwiGLU.

    Args:
        x: `[T, H]`.
        up: `[.., H, 2I]`, no biases.
        rows: how rows are sorted.
        activation: where the halves stand in the 2I columns.

    Returns:
        z `[N, 2I]` and a `[N, I]`, sorted by slot; rows without an expert are undefined.
    """
    z = grouped_gemm(x, up, rows, gather=True)
    return z, activation(z)

"""How the kernels are told of a memory layout."""

from __future__ import annotations

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import Matrices


def bank_strides(matrices: Matrices) -> dict[str, int]:
    """Return the strides of both banks, in elements, under the names of the kernels' constants.

    From expert to expert each bank has its own; within a matrix `[in, out]` they share theirs.
    """
    trainable, frozen = matrices.trainable, matrices.frozen
    inner = frozen if frozen.shape[0] else trainable
    return {
        "STRIDE_T": trainable.stride(0),
        "STRIDE_F": frozen.stride(0),
        "W_K": inner.stride(1),
        "W_N": inner.stride(2),
    }


def halves(activation: SwiGLU, inner: int) -> dict[str, int]:
    """Return where gate j and up j stand among 2I columns: at `j * STEP` and `j * STEP + UP`."""
    return {"STEP": 2, "UP": 1} if activation.interleaved else {"STEP": 1, "UP": inner}

"""How the kernels are told of a memory layout."""

from __future__ import annotations

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

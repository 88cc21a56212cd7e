"""What one launch of the Triton path computes: all slots, or those of one chunk of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from esft_kernels.bank import Matrices, StoredMatrices
from esft_kernels.chunks import experts_at_once
from esft_kernels.quantised.triton import dequantise
from esft_kernels.rows import Rows


@dataclass(frozen=True)
class Part:
    """The slots of a launch, with matrices that are there.

    Attributes:
        trainable: `[n, in, out]`.
        frozen: `[.., in, out]`; a slot s from `border` on has `frozen[s - border]`.
        trainable_bias: `[n, out]`, or None.
        frozen_bias: `[.., out]`, cut as frozen is, or None.
        first: slots below this are none of this part's.
        border: slots below this have their matrix in the trainable bank, if in this part at all.
        end: slots from this on are none of this part's.
    """

    trainable: Tensor
    frozen: Tensor
    trainable_bias: Tensor | None
    frozen_bias: Tensor | None
    first: int
    border: int
    end: int

    @property
    def slots(self) -> tuple[int, int, int]:
        """The three numbers, as the kernels take them."""
        return self.first, self.border, self.end

    @property
    def strides(self) -> dict[str, int]:
        """Strides of both banks, in elements, under the names of the kernels' constants.

        From expert to expert each bank has its own; within a matrix `[in, out]` they share theirs.
        """
        inner = self.frozen if self.frozen.shape[0] else self.trainable
        return {
            "STRIDE_T": self.trainable.stride(0),
            "STRIDE_F": self.frozen.stride(0),
            "W_K": inner.stride(1),
            "W_N": inner.stride(2),
        }


def parts(matrices: Matrices, rows: Rows, slots: int | None = None) -> Iterator[Part]:
    """Yield the parts of a product over both banks; together they compute each slot once.

    A dense frozen bank is one part. A quantised one is dequantised some experts at a time, into a
    buffer that the next part overwrites; those without rows are left as they are, which the GPU
    sees by itself.

    Args:
        matrices: both banks.
        rows: how rows are sorted.
        slots: slots from this on are not wanted; default all.
    """
    end = rows.num_slots if slots is None else slots
    n, biases = matrices.trainable.shape[0], (matrices.trainable_bias, matrices.frozen_bias)
    if not isinstance(matrices.frozen, StoredMatrices):
        yield Part(matrices.trainable, matrices.frozen, *biases, 0, n, end)
        return
    stored = matrices.frozen.stored
    # The trainable bank goes with the first chunk, which may be empty.
    wanted = max(0, end - n)
    step = min(experts_at_once(stored), max(wanted, 1))
    scratch = torch.empty(
        min(step, wanted), *stored.shape[1:], dtype=stored.dtype, device=stored.device
    )
    for start in range(0, max(wanted, 1), step):
        stop = min(start + step, wanted)
        dense = scratch[: stop - start]
        dequantise(stored[start:stop], rows.offsets[n + start :], dense)
        yield Part(
            matrices.trainable,
            matrices.frozen.orient(dense),
            matrices.trainable_bias,
            None if matrices.frozen_bias is None else matrices.frozen_bias[start:stop],
            n + start if start else 0,
            n + start,
            min(n + stop, end),
        )

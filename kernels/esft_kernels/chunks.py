"""A quantised bank, some experts at a time: dequantised into one buffer, used, overwritten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esft_kernels.bank import StoredMatrices
from esft_kernels.grouped_mm import grouped_linear
from esft_kernels.quantised.storage import Quantised
from esft_kernels.segments import Segment

SCRATCH_BYTES = {"cpu": 2**24}
"""Of dequantised experts at a time: more is hardly faster (`kernels/bench/README.md`)."""
LARGE_SCRATCH_BYTES = 2**28
"""On other devices: enough rows to keep one busy, at a fraction of a large layer's bank."""


def experts_at_once(stored: Quantised) -> int:
    """Return how many experts are dequantised at a time: at least one."""
    expert = stored.shape[1:].numel() * stored.dtype.itemsize
    return max(1, SCRATCH_BYTES.get(stored.device.type, LARGE_SCRATCH_BYTES) // max(expert, 1))


def stored_linear(x: Tensor, matrices: StoredMatrices, segment: Segment) -> Tensor:
    """Multiply each group's rows by its matrix, as `grouped_linear` does.

    Only experts that have rows are dequantised.

    Args:
        x: `[M, in]`, rows sorted by group, in the stored weights' dtype.
        matrices: `[G, in, out]`.
        segment: where each group's rows end.

    Returns:
        `[M, out]`.
    """
    y = x.new_empty(x.shape[0], matrices.shape[-1])
    stored, ends = matrices.stored, [0, *segment.ends]
    runs = list(_runs(segment.ends, experts_at_once(stored)))
    longest = max((last - first for first, last in runs), default=0)
    scratch = torch.empty(longest, *stored.shape[1:], dtype=stored.dtype, device=stored.device)
    for first, last in runs:
        dense = stored[first:last].dequantise(out=scratch[: last - first])
        rows = slice(ends[first], ends[last])
        y[rows] = grouped_linear(
            x[rows], matrices.orient(dense), segment.offsets[first:last] - ends[first]
        )
    return y


def _runs(ends: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield `(first, last)` of consecutive groups that have rows, `most` at a time at most."""
    first = None
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if first is not None and (start == end or group - first == most):
            yield first, group
            first = None
        if first is None and start < end:
            first = group
    if first is not None:
        yield first, len(ends)


class StoredLinear(torch.autograd.Function):
    """`x @ matrices[expert]`, differentiable in x; the backward dequantises the matrix anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: StoredMatrices, expert: int) -> Tensor:
        """Multiply x `[M, in]`: `[M, out]`."""
        ctx.matrices, ctx.expert = matrices, expert
        return x @ matrices[expert].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        return dy @ ctx.matrices[ctx.expert].t().to(dy.dtype), None, None

"""Grouped matrix products: PyTorch's `grouped_mm`, or a loop where it does not apply.

`grouped_mm` takes fp32, bf16 and fp16 with strides of a multiple of 16 bytes. The loop serves
float64 and odd sizes; it cuts views with `split` and `unbind`, never `w[e]`, which would cost a
full-size gradient buffer per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group's rows by its matrix: `y[m] = x[m] @ weight[g]`.

    Args:
        x: `[M, in]`, rows sorted by group.
        weight: `[G, in, out]`, of x's dtype; any strides with one dimension dense.
        offsets: `[G]` int32, where each group's rows end; the last is M.

    Returns:
        `[M, out]`.
    """
    if x.shape[0] == 0:
        return x.new_zeros(0, weight.shape[-1])
    if _can_group(x, weight):
        return F.grouped_mm(x, weight, offs=offsets)
    return torch.cat(
        [rows @ matrix for rows, matrix in zip(_split(x, offsets), weight.unbind(0), strict=True)]
    )


def grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Sum each group's outer products: `out[g] = a[rows of g].T @ b[rows of g]`.

    Args:
        a: `[M, p]`, rows sorted by group.
        b: `[M, q]`, likewise.
        offsets: `[G]` int32, where each group's rows end; the last is M.

    Returns:
        `[G, p, q]`; zero for a group without rows.
    """
    if a.shape[0] == 0:
        return a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    if _can_group(a, b):
        return F.grouped_mm(a.t(), b, offs=offsets)
    pairs = zip(_split(a, offsets), _split(b, offsets), strict=True)
    return torch.stack([left.t() @ right for left, right in pairs])


def _can_group(*tensors: Tensor) -> bool:
    return all(t.dtype in _GROUPED_DTYPES and _aligned(t) for t in tensors)


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    dense = 1 in tensor.stride()[-2:]
    return dense and all(
        stride == 1 or stride * size % _ALIGNMENT == 0 for stride in tensor.stride()
    )


def _split(rows: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    ends = offsets.tolist()
    return rows.split([end - start for start, end in zip([0, *ends], ends, strict=False)])

"""The oracle of `down_dact_bwd`: formulas in PyTorch, in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.activation import SwiGLU
from esft_kernels.bank import Matrices
from esft_kernels.grouped_gemm.naive import grouped_gemm
from esft_kernels.rows import Rows


def down_dact_bwd(
    d_out: Tensor, down: Matrices, z: Tensor, weight: Tensor, rows: Rows, activation: SwiGLU
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through the weighted sum, the down projection and SwiGLU.

    With `a = silu(gate) * up` and `da = W2 d_out`, unweighted: the gradient of a row's weight is
    `<d_out, W2^T a> = <da, a>`, so that the expert's output is not needed.

    Args:
        d_out: `[T, H]`.
        down: `[.., I, H]`.
        z: `[N, 2I]`, the up projection's output, sorted by slot.
        weight: `[T, K]`.
        rows: how rows are sorted.
        activation: where the halves stand in the 2I columns.

    Returns:
        dz `[N, 2I]` and `weight * a` `[N, I]`, sorted by slot, undefined for rows without an
        expert; and the gradient of weight, `[T, K]`, 0 for rows without an expert.
    """
    da = grouped_gemm(d_out, down.transpose(), rows, gather=True)
    held = rows.offsets[-1]
    w = weight.reshape(-1)[rows.flat.long()][:, None]
    gate, up = activation.split(z)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    dz = torch.empty_like(z)
    d_gate, d_up = activation.split(dz)
    d_gate.copy_(w * da * up * (sigmoid + silu * (1 - sigmoid)))
    d_up.copy_(w * da * silu)
    d_weight = torch.zeros_like(weight).reshape(-1)
    d_weight[rows.flat[:held].long()] = (da * silu * up).sum(-1)[:held]
    return dz, w * silu * up, d_weight.view_as(weight)

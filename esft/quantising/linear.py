"""A linear layer whose weight is kept in few bits, and read anew wherever it is multiplied by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from esft_kernels.quantised import Quantised
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esft.quantising.stored import StoredWeight

PIECE = 2**24
"""Numbers of a weight that are read at a time, at least one row of them."""


class QuantisedLinear(nn.Linear):
    """`y = x @ weight.T + bias` with a frozen weight `[out, in]`.

    What is read of the weight is not kept for the backward pass, which reads it once more for the
    gradient of x. Under autocast it is read in autocast's dtype.

    Args:
        weight: `[out, in]`.
        bias: `[out]`, frozen, or None.
    """

    def __init__(self, weight: Quantised, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.out_features, self.in_features = weight.shape
        self.stored = StoredWeight(weight)
        own = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", own)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The whole weight, read now: for code that multiplies by it itself."""
        return self.stored.value.dequantise()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for `[..., in]`."""
        weight, kind = self.stored.value, x.device.type
        bias: Tensor | None = self.bias
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        if dtype != weight.dtype:
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            found: Tensor = _Product.apply(x, weight, bias, dtype)
        return found


class _Product(torch.autograd.Function):
    """`F.linear` with a weight that is read piece by piece, forward and again backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Quantised, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        if weight.shape.numel() <= PIECE:
            return F.linear(x, weight.dequantise(dtype), bias)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, weight.shape[0])
        for rows, part in _pieces(weight, dtype):
            torch.mm(x_TI, part.t(), out=y_TO[:, rows])
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight: Quantised = ctx.weight
        if weight.shape.numel() <= PIECE:
            return dy @ weight.dequantise(ctx.dtype), None, None, None
        dy_TO = dy.reshape(-1, dy.shape[-1])
        # Summed up in fp32: many pieces' products, each rounded, would drift in 16 bits.
        wide = torch.promote_types(ctx.dtype, torch.float32)
        dx_TI = torch.zeros(len(dy_TO), weight.shape[1], dtype=wide, device=dy.device)
        for rows, part in _pieces(weight, ctx.dtype):
            dx_TI += dy_TO[:, rows] @ part
        return dx_TI.to(dy.dtype).view(*dy.shape[:-1], -1), None, None, None


def _pieces(weight: Quantised, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield a weight `[out, in]` some rows at a time, with where they are."""
    step = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weight[rows].dequantise(dtype)

"""`weight + scale * left @ right`, and its gradient: how low-rank factors change a weight.

The sum is formed in float64 and rounded to float32, then to the weight's dtype. Another order of
summation, as on another machine, then changes the result about once in a thousand million numbers
where the weight is float32, and next to never where it is bf16: what a run trained with is what is
loaded and merged, to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def summed(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return `weight + scale * left @ right`, in the weight's shape and dtype.

    Args:
        weight: as many numbers as the product, in any shape.
        left: `[..., p, r]`.
        right: `[..., r, q]`.
        scale: alpha / r.
    """
    product = _product(left, right, scale)
    return _rounded(weight.double() + product.reshape(weight.shape), weight.dtype)


class FactoredSum(torch.autograd.Function):
    """The sum of a stack and the products of several pairs of factors, each at its own numbers.

    `apply(weight, scale, spots, *left, *right)` takes the stack `[n, ...]`, where in a flattened
    slice each product goes, and the factors `[n, p, r]` and `[n, r, q]`. It returns the sum in the
    stack's shape and dtype. Only the factors get a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: float, spots: list[slice | Tensor], *factors: Tensor
    ) -> Tensor:
        """See the class."""
        ctx.scale, ctx.spots = scale, spots
        ctx.save_for_backward(*factors)
        total = weight.to(torch.float64, copy=True).flatten(1)
        for spot, left, right in _pairs(spots, factors):
            total[:, spot] += _product(left, right, scale).flatten(1)
        return _rounded(total, weight.dtype).view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        lefts, rights = [], []
        for spot, left, right in _pairs(ctx.spots, ctx.saved_tensors):
            wide = torch.promote_types(torch.promote_types(grad.dtype, left.dtype), torch.float32)
            d_product = grad.flatten(1)[:, spot].to(wide) * ctx.scale
            d_product = d_product.view(left.shape[0], left.shape[1], right.shape[2])
            lefts.append((d_product @ right.to(wide).mT).to(left.dtype))
            rights.append((left.to(wide).mT @ d_product).to(right.dtype))
        return None, None, None, *lefts, *rights


def _pairs(spots: list[slice | Tensor], factors: tuple[Tensor, ...]) -> Any:
    return zip(spots, factors[: len(spots)], factors[len(spots) :], strict=True)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return left.double() @ right.double() * scale


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(torch.promote_types(dtype, torch.float32)).to(dtype)

"""The PyTorch path of `moe_mlp`: `grouped_mm` over sorted rows, on any device.

Saved for the backward: x (where an expert trains), the up projection's output z, and the routing.
The activation is recomputed; the down projection's output is never kept, because the gate's
gradient follows from `<dO, y> = <dO W2, a>`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esft_kernels.bank import ExpertBank, Matrices, Projection, StoredMatrices
from esft_kernels.checks import check_inner
from esft_kernels.chunks import stored_linear
from esft_kernels.grouped_mm import grouped_linear, grouped_outer
from esft_kernels.segments import Segment, cut


def moe_mlp(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> Tensor:
    """Compute what `esft_kernels.moe_mlp` does; x is in the frozen bank's dtype."""
    out: Tensor = _MoeMlp.apply(
        x,
        topk_index,
        topk_weight,
        bank.up.trainable,
        bank.down.trainable,
        bank.up.trainable_bias,
        bank.down.trainable_bias,
        bank,
    )
    return out


class _Linear:
    """One bank of one projection."""

    def __init__(self, matrices: Matrices, projection: Projection, trainable: bool) -> None:
        self.weight = matrices.trainable if trainable else matrices.frozen
        self.bias = matrices.trainable_bias if trainable else matrices.frozen_bias
        self.transposed = projection.transposed

    def forward(self, x: Tensor, segment: Segment) -> Tensor:
        y = _multiply(x, self.weight, segment)
        return y if self.bias is None else y + self.bias[_group(segment.offsets, x.shape[0])]

    def input_grad(self, dy: Tensor, segment: Segment) -> Tensor:
        return _multiply(dy, self.weight.transpose(-2, -1), segment)

    def weight_grad(self, x: Tensor, dy: Tensor, segment: Segment) -> Tensor:
        if self.transposed:
            return grouped_outer(x, dy, segment.offsets)
        return grouped_outer(dy, x, segment.offsets)


def _multiply(x: Tensor, weight: Tensor | StoredMatrices, segment: Segment) -> Tensor:
    if isinstance(weight, StoredMatrices):
        return stored_linear(x, weight, segment)
    return grouped_linear(x, weight, segment.offsets)


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_index: Tensor,
        topk_weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        bank: ExpertBank,
    ) -> Tensor:
        segments = cut(topk_index, bank)
        ups, downs = bank.up.matrices(), bank.down.matrices()
        zs, ys = [], []
        for trainable, segment in ((True, segments.selected), (False, segments.frozen)):
            rows = x.index_select(0, segment.token)
            z = _Linear(ups, bank.up, trainable).forward(rows, segment)
            a = check_inner(bank.activation(z), z, bank)
            ys.append(_Linear(downs, bank.down, trainable).forward(a, segment))
            zs.append(z)
        ctx.bank, ctx.segments = bank, segments
        # The frozen rows' z serves the gradients of x and of the gates only; x, the trainable
        # bank's alone.
        flows = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        trains = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if trains else None, topk_weight, zs[0], zs[1] if flows else None)
        wide = torch.promote_types(x.dtype, topk_weight.dtype)
        out = segments.sum_by_token([y.to(wide) for y in ys], topk_weight.to(wide))
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weight, *zs = ctx.saved_tensors
        bank, segments = ctx.bank, ctx.segments
        need_x, _, need_gate, need_up, need_down, need_up_bias, need_down_bias, _ = (
            ctx.needs_input_grad
        )
        weight = topk_weight.reshape(-1)
        d_gate = torch.zeros_like(weight) if need_gate else None
        ups, downs = bank.up.matrices(), bank.down.matrices()

        dxs: list[Tensor] = []
        grads: dict[str, Tensor] = {}
        parts: list[tuple[bool, Segment, Tensor]] = [(True, segments.selected, zs[0])]
        if need_x or need_gate:
            parts.append((False, segments.frozen, zs[1]))
        for trainable, segment, z in parts:
            up = _Linear(ups, bank.up, trainable)
            down = _Linear(downs, bank.down, trainable)
            gate = weight.index_select(0, segment.row)[:, None]
            # Before the gate: <dy, y> is the gate's gradient.
            dy = d_out.index_select(0, segment.token)
            da = down.input_grad(dy, segment)
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                a = bank.activation(z)
            if d_gate is not None:
                dots = (da * a.detach()).sum(-1, dtype=d_gate.dtype)
                if down.bias is not None:
                    bias = down.bias[_group(segment.offsets, dy.shape[0])]
                    dots = dots + (dy * bias).sum(-1, dtype=d_gate.dtype)
                d_gate[segment.row] = dots
            (dz,) = torch.autograd.grad(a, z, da.mul_(gate))
            if trainable:
                dy.mul_(gate)
                if need_down:
                    grads["down"] = down.weight_grad(a.detach(), dy, segment)
                if need_down_bias:
                    grads["down_bias"] = _group_sum(dy, segment.offsets)
                if need_up:
                    rows = x.index_select(0, segment.token)
                    grads["up"] = up.weight_grad(rows, dz, segment)
                if need_up_bias:
                    grads["up_bias"] = _group_sum(dz, segment.offsets)
            if need_x:
                dxs.append(up.input_grad(dz, segment))

        return (
            segments.sum_by_token(dxs) if need_x else None,
            None,
            None if d_gate is None else d_gate.view_as(topk_weight),
            _like(grads.get("up"), bank.up.trainable),
            _like(grads.get("down"), bank.down.trainable),
            _like(grads.get("up_bias"), bank.up.trainable_bias),
            _like(grads.get("down_bias"), bank.down.trainable_bias),
            None,
        )


def _group(offsets: Tensor, rows: int) -> Tensor:
    """Return the group of each row: `[M]` int64."""
    place = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, place, right=True)


def _group_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sum each group's rows: `[M, q]` -> `[G, q]`."""
    ones = rows.new_zeros(rows.shape[0], 16 // rows.element_size())
    ones[:, 0] = 1  # padded to the width that grouped_mm accepts
    return grouped_outer(ones, rows, offsets)[:, 0]


def _like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if grad is None or parameter is None else grad.to(parameter.dtype)

"""`moe_mlp`: a layer's routed experts, with weight gradients for the trainable bank only.

Saved for the backward: x, the up projection's output z, and the routing. The activation is
recomputed; the down projection's output is never kept, because the gate's gradient follows from
`<dO, y> = <dO W2, a>`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esft_kernels.bank import ExpertBank, Projection
from esft_kernels.grouped import grouped_linear, grouped_outer
from esft_kernels.routing import Segment, route


def moe_mlp(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> Tensor:
    """Compute `out[t] = sum_k topk_weight[t, k] * expert[topk_index[t, k]](x[t])`.

    The backward gives the gradients of `x` and `topk_weight` through all experts, and weight
    gradients for the trainable bank alone: nothing of the frozen bank's size is ever allocated.
    Two calls with equal input give equal bits.

    Args:
        x: `[T, H]`; cast to the frozen bank's dtype, in which everything is computed. The
            trainable bank is cast to it too.
        topk_index: `[T, K]` int64 expert ids, each below E.
        topk_weight: `[T, K]`, the weight of each chosen expert's output; the products are summed
            in the wider dtype of this and x.
        bank: the experts.

    Returns:
        `[T, H]` in x's dtype.
    """
    # The weights decide, as in transformers: casting the frozen bank would copy it at each step.
    compute_x = x.to(bank.up.frozen.dtype)
    out: Tensor = _MoeMlp.apply(
        compute_x,
        topk_index,
        topk_weight,
        bank.up.trainable,
        bank.down.trainable,
        bank.up.trainable_bias,
        bank.down.trainable_bias,
        bank,
    )
    return out.to(x.dtype)


class _Linear:
    """One bank of one projection, cast to the compute dtype and laid out `[G, in, out]`."""

    def __init__(self, projection: Projection, trainable: bool, dtype: torch.dtype) -> None:
        weight = projection.trainable if trainable else projection.frozen
        bias = projection.trainable_bias if trainable else projection.frozen_bias
        weight = weight.detach().to(dtype)
        self.weight = weight if projection.transposed else weight.transpose(-2, -1)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.transposed = projection.transposed

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        y = grouped_linear(x, self.weight, offsets)
        return y if self.bias is None else y + self.bias[_group(offsets, x.shape[0])]

    def input_grad(self, dy: Tensor, offsets: Tensor) -> Tensor:
        return grouped_linear(dy, self.weight.transpose(-2, -1), offsets)

    def weight_grad(self, x: Tensor, dy: Tensor, offsets: Tensor) -> Tensor:
        if self.transposed:
            return grouped_outer(x, dy, offsets)
        return grouped_outer(dy, x, offsets)


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
        routing = route(topk_index, bank.slot, bank.num_selected)
        zs, ys = [], []
        for trainable, segment in ((True, routing.selected), (False, routing.frozen)):
            rows = x.index_select(0, segment.token)
            z = _Linear(bank.up, trainable, x.dtype).forward(rows, segment.offsets)
            a = bank.activation(z)
            ys.append(_Linear(bank.down, trainable, x.dtype).forward(a, segment.offsets))
            zs.append(z)
        ctx.bank, ctx.routing = bank, routing
        # The frozen rows' z serves the gradients of x and of the gates only.
        flows = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x, topk_weight, zs[0], zs[1] if flows else None)
        wide = torch.promote_types(x.dtype, topk_weight.dtype)
        out = routing.sum_by_token(_join(ys).to(wide), topk_weight.to(wide))
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weight, *zs = ctx.saved_tensors
        bank, routing = ctx.bank, ctx.routing
        need_x, _, need_gate, need_up, need_down, need_up_bias, need_down_bias, _ = (
            ctx.needs_input_grad
        )
        weight = topk_weight.reshape(-1)
        d_gate = torch.empty_like(weight) if need_gate else None

        dxs: list[Tensor] = []
        grads: dict[str, Tensor] = {}
        parts: list[tuple[bool, Segment, Tensor]] = [(True, routing.selected, zs[0])]
        if need_x or need_gate:
            parts.append((False, routing.frozen, zs[1]))
        for trainable, segment, z in parts:
            up = _Linear(bank.up, trainable, x.dtype)
            down = _Linear(bank.down, trainable, x.dtype)
            gate = weight.index_select(0, segment.row)[:, None]
            # Before the gate: <dy, y> is the gate's gradient.
            dy = d_out.index_select(0, segment.token)
            da = down.input_grad(dy, segment.offsets)
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                a = bank.activation(z)
            if d_gate is not None:
                dots = (da * a.detach()).sum(-1, dtype=d_gate.dtype)
                if down.bias is not None:
                    bias = down.bias[_group(segment.offsets, dy.shape[0])]
                    dots = dots + (dy * bias).sum(-1, dtype=d_gate.dtype)
                d_gate[segment.row] = dots
            (dz,) = torch.autograd.grad(a, z, (da * gate).to(a.dtype))
            if trainable:
                gated = (dy * gate).to(dy.dtype)
                if need_down:
                    grads["down"] = down.weight_grad(a.detach(), gated, segment.offsets)
                if need_down_bias:
                    grads["down_bias"] = _group_sum(gated, segment.offsets)
                if need_up:
                    rows = x.index_select(0, segment.token)
                    grads["up"] = up.weight_grad(rows, dz, segment.offsets)
                if need_up_bias:
                    grads["up_bias"] = _group_sum(dz, segment.offsets)
            if need_x:
                dxs.append(up.input_grad(dz, segment.offsets))

        return (
            routing.sum_by_token(_join(dxs)) if need_x else None,
            None,
            None if d_gate is None else d_gate.view_as(topk_weight),
            _like(grads.get("up"), bank.up.trainable),
            _like(grads.get("down"), bank.down.trainable),
            _like(grads.get("up_bias"), bank.up.trainable_bias),
            _like(grads.get("down_bias"), bank.down.trainable_bias),
            None,
        )


def _join(parts: list[Tensor]) -> Tensor:
    """Put the selected and the frozen rows together, without a copy where one has all of them."""
    filled = [rows for rows in parts if rows.shape[0]]
    return filled[0] if len(filled) == 1 else torch.cat(parts)


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

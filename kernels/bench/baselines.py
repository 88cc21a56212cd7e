"""Layers of experts to compare `moe_mlp` with: PyTorch's `grouped_mm` three ways, and transformers.

What a careful user would write: rows are gathered and put back by permutations whose gradients are
permutations again, without atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


class _Gather(torch.autograd.Function):
    """Copy tokens to their rows, `[T, H]` -> `[N, H]`; the gradient sums a token's K rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return d_rows.index_select(0, place.view(-1)).view(*place.shape, -1).sum(1), None, None


class _Permute(torch.autograd.Function):
    """Put rows in another order; the gradient's are put back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return d_rows.index_select(0, back), None, None


class _PrefixLinear(torch.autograd.Function):
    """`grouped_mm` whose weight gradient is that of the first n experts: `offs[:n]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, trained: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.trained = trained.shape[0]
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        dx = F.grouped_mm(dy, weight, offs=offsets)
        return dx, None, None, F.grouped_mm(dy.t(), x, offs=offsets[: ctx.trained])


def grouped(
    x: Tensor,
    index: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    trained: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute a SwiGLU layer with `grouped_mm`; autograd decides which gradients there are.

    Args:
        x: `[T, H]`.
        index: `[T, K]`, expert ids.
        gates: `[T, K]`.
        up: `[E, 2I, H]`.
        down: `[E, H, I]`.
        trained: gets the gradients of the first n experts' up and down, `[n, ..]` each; its values
            are not read.

    Returns:
        `[T, H]`.
    """
    ids, order = torch.sort(index.reshape(-1), stable=True)
    experts = torch.arange(up.shape[0], device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, experts, right=True, out_int32=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)

    def linear(rows: Tensor, weight: Tensor, own: Tensor | None) -> Tensor:
        if own is None:
            return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
        return _PrefixLinear.apply(rows, weight, offsets, own)

    rows = _Gather.apply(x, order // index.shape[1], place.view(index.shape))
    gate, inner = linear(rows, up, trained and trained[0]).chunk(2, dim=-1)
    y = linear(F.silu(gate) * inner, down, trained and trained[1])
    y = _Permute.apply(y, place, order).view(*index.shape, -1)
    return (y * gates[..., None]).sum(1)


def prefix(
    up: Tensor, down: Tensor, slot: Tensor, selected: int
) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]:
    """Return `grouped` for weights in order of slots, and what gets the first n experts' gradients.

    Args:
        up: `[E, 2I, H]`, in order of experts.
        down: `[E, H, I]`, likewise.
        slot: `[E]`, expert -> slot.
        selected: n.
    """
    order = slot.argsort()
    up, down = up[order], down[order]
    own = (up[:selected].detach().requires_grad_(), down[:selected].detach().requires_grad_())
    return lambda x, index, gates: grouped(x, slot[index], gates, up, down, own), own


def stock(up: Tensor, down: Tensor) -> Qwen3MoeExperts:
    """Return transformers' experts of a Qwen3-MoE on these weights; see `stock_forward`."""
    experts, width, hidden = up.shape
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width // 2, num_experts=experts
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(up.detach())
    module.down_proj = torch.nn.Parameter(down.detach())
    return module


stock_forward = grouped_mm_experts_forward
"""transformers' own: `(module, x, index, gates) -> [T, H]`."""

"""The Triton path of `moe_mlp`: sorted rows in tiles of one expert each, without a host sync.

Saved for the backward: x (where an expert trains), the up projection's output z, and the routing.
With `SwiGLU` gathers and the activation are part of the products' kernels; any other activation,
and biases, take the generic path, where PyTorch computes the activation between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esft_kernels import grouped
from esft_kernels.activation import SwiGLU
from esft_kernels.bank import ExpertBank
from esft_kernels.checks import check_inner
from esft_kernels.config import Config, layer_config
from esft_kernels.down_dact_bwd.triton import down_dact_bwd
from esft_kernels.gather_sum.triton import gather_sum
from esft_kernels.grouped_gemm.triton import grouped_gemm
from esft_kernels.route.triton import route
from esft_kernels.rows import Rows
from esft_kernels.up_swiglu_fwd.triton import up_swiglu_fwd
from esft_kernels.wgrad_selected.triton import wgrad_selected


def moe_mlp(x: Tensor, topk_index: Tensor, topk_weight: Tensor, bank: ExpertBank) -> Tensor:
    """Compute what `esft_kernels.moe_mlp` does; x is in the frozen bank's dtype."""
    if x.shape[0] == 0:
        return grouped.moe_mlp(x, topk_index, topk_weight, bank)  # no program to launch
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors'
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
        x, topk_weight = x.contiguous(), topk_weight.contiguous()
        config = layer_config(
            x.device,
            x.dtype,
            x.shape[1],
            bank.down.in_features,
            topk_index.numel() / bank.num_slots,
        )
        rows = route(topk_index, bank.slot, config.block_m, bank.num_slots)
        ups, downs = bank.up.matrices(), bank.down.matrices()
        swiglu = _fused_activation(bank)
        if swiglu is not None:
            z, a = up_swiglu_fwd(x, ups, rows, swiglu, config.kernels["up_swiglu_fwd"])
        else:
            z = grouped_gemm(x, ups, rows, gather=True, config=config.kernels["grouped_gemm"])
            a = check_inner(bank.activation(z), z, bank).contiguous()
        y = grouped_gemm(a, downs, rows, gather=False, config=config.kernels["grouped_gemm"])
        ctx.bank, ctx.rows, ctx.config = bank, rows, config
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, topk_weight, z)
        return gather_sum(y, rows, topk_weight, config=config.kernels["gather_sum"])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, topk_weight, z = ctx.saved_tensors
        bank, rows, config = ctx.bank, ctx.rows, ctx.config
        need_x, _, need_gate, need_up, need_down, need_up_bias, need_down_bias, _ = (
            ctx.needs_input_grad
        )
        d_out = d_out.contiguous()
        n = bank.num_selected
        # Without a gradient to pass on, only the trainable bank's rows matter.
        slots = rows.num_slots if need_x or need_gate else n
        swiglu = _fused_activation(bank)
        if swiglu is not None:
            dz, gated, d_gate = down_dact_bwd(
                d_out,
                bank.down.matrices(),
                z,
                topk_weight,
                rows,
                swiglu,
                config.kernels["down_dact_bwd"],
                slots,
            )
        else:
            dz, gated, d_gate = _through_activation(
                d_out, z, topk_weight, bank, rows, config, slots
            )

        def outer(p: Tensor, q: Tensor, like: Tensor, gather_p: bool, gather_q: bool) -> Tensor:
            return wgrad_selected(
                p,
                q,
                rows,
                n,
                gather_p=gather_p,
                gather_q=gather_q,
                dtype=like.dtype,
                config=config.kernels["wgrad_selected"],
            )

        d_up = d_down = d_up_bias = d_down_bias = d_x = None
        # The down projection first: its buffer, as long as all rows may be selected ones, is then
        # free before the input's gradient needs one.
        if need_down and bank.down.transposed:
            d_down = outer(gated, d_out, bank.down.trainable, False, True)
        elif need_down:
            d_down = outer(d_out, gated, bank.down.trainable, True, False)
        del gated
        if need_up and bank.up.transposed:
            d_up = outer(x, dz, bank.up.trainable, True, False)
        elif need_up:
            d_up = outer(dz, x, bank.up.trainable, False, True)
        if need_up_bias:
            ones = dz.new_ones(dz.shape[0], 1)
            d_up_bias = outer(ones, dz, bank.up.trainable_bias, False, False)[:, 0]
        if need_down_bias:
            weight = _by_row(topk_weight, rows).to(d_out.dtype)
            d_down_bias = outer(weight, d_out, bank.down.trainable_bias, False, True)[:, 0]
        if need_x:
            back = bank.up.matrices().transpose()
            d_rows = grouped_gemm(
                dz, back, rows, gather=False, config=config.kernels["grouped_gemm"]
            )
            d_x = gather_sum(d_rows, rows, config=config.kernels["gather_sum"])
        d_weight = d_gate.to(topk_weight.dtype) if need_gate else None
        return d_x, None, d_weight, d_up, d_down, d_up_bias, d_down_bias, None


def _fused_activation(bank: ExpertBank) -> SwiGLU | None:
    """Return the activation if the kernels compute it themselves."""
    plain = bank.up.frozen_bias is None and bank.down.frozen_bias is None
    return bank.activation if plain and isinstance(bank.activation, SwiGLU) else None


def _through_activation(
    d_out: Tensor,
    z: Tensor,
    weight: Tensor,
    bank: ExpertBank,
    rows: Rows,
    config: Config,
    slots: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `down_dact_bwd` does, for any activation and with biases."""
    downs = bank.down.matrices()
    da = grouped_gemm(
        d_out,
        downs.transpose(),
        rows,
        gather=True,
        config=config.kernels["grouped_gemm"],
        slots=slots,
    )
    row_weight = _by_row(weight, rows)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = bank.activation(z)
    (dz,) = torch.autograd.grad(a, z, (da * row_weight).to(a.dtype))
    a = a.detach()
    dots = (da * a).sum(-1, dtype=torch.float32)
    if downs.frozen_bias is not None:
        # <d_out, bias> for every token and slot is a small product; one for every row is not.
        bias = torch.cat([downs.trainable_bias, downs.frozen_bias])  # type: ignore[list-item]
        slot = torch.searchsorted(
            rows.offsets[1:], torch.arange(dots.shape[0], device=dots.device), right=True
        ).clamp_(max=rows.num_slots - 1)
        dots += (d_out.float() @ bias.float().t())[rows.token, slot]
    # Rows without an expert were never written.
    d_weight = torch.where(rows.place >= 0, dots[rows.place.clamp(min=0)], 0.0)
    return dz.contiguous(), (a * row_weight).to(a.dtype), d_weight


def _by_row(weight: Tensor, rows: Rows) -> Tensor:
    """Return each sorted row's weight: `[N, 1]`."""
    return weight.reshape(-1).index_select(0, rows.flat)[:, None]

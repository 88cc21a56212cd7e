"""Routed feed-forward experts behind transformers' experts interface."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation


def _routed(
    num_experts: int, index_TK: Tensor, weight_TK: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each expert in use: its id, its tokens `[M]`, their weights `[M, 1]`."""
    for expert in range(num_experts):
        token_M, choice_M = torch.where(index_TK == expert)
        if token_M.numel():
            yield expert, token_M, weight_TK[token_M, choice_M, None]


@use_experts_implementation
class GatedExperts(nn.Module):
    """`sum_k w_k * down_k(act(gate_k(x)) * up_k(x))`, arXiv 2002.05202.

    Args:
        config: of the model; tells which implementation of the interface runs.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one expert.
        hidden_act: transformers' name of the activation.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Run the plain loop, which other implementations of the interface replace: `[T, H]`."""
        out_TH = torch.zeros_like(x_TH)
        for expert, token_M, weight_M in _routed(self.num_experts, index_TK, weight_TK):
            gate, up = (x_TH[token_M] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            y_MH = (self.act_fn(gate) * up) @ self.down_proj[expert].T
            out_TH.index_add_(0, token_M, (y_MH * weight_M).to(out_TH.dtype))
        return out_TH


@use_experts_implementation(has_gate=False)
class PlainExperts(nn.Module):
    """`sum_k w_k * down_k(act(up_k(x)))`: experts without a gate.

    Args:
        config: as for `GatedExperts`, and so are the others.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I, of one expert.
        hidden_act: transformers' name of the activation.
    """

    def __init__(
        self,
        config: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Run the plain loop, which other implementations of the interface replace: `[T, H]`."""
        out_TH = torch.zeros_like(x_TH)
        for expert, token_M, weight_M in _routed(self.num_experts, index_TK, weight_TK):
            y_MH = self.act_fn(x_TH[token_M] @ self.up_proj[expert].T) @ self.down_proj[expert].T
            out_TH.index_add_(0, token_M, (y_MH * weight_M).to(out_TH.dtype))
        return out_TH

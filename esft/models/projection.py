"""Routed projections: linear maps of which each head of a token takes some of its own."""

from __future__ import annotations

from typing import Any

import torch
from esft_kernels.grouped_mm import grouped_linear
from torch import Tensor, nn


class ProjectionExperts(nn.Module):
    """Experts that are one matrix each, `[E, out, in]`; each of A heads has E/A of them.

    While a selection is attached (see `esft.layouts.projection`), `esft` holds the two banks that
    `weight` was split into.

    Args:
        heads: A.
        num_experts: E, over all heads.
        in_features: of each matrix.
        out_features: of each matrix.
        sums_heads: whether the heads' outputs are summed, or stay apart.
    """

    def __init__(
        self, heads: int, num_experts: int, in_features: int, out_features: int, sums_heads: bool
    ) -> None:
        super().__init__()
        self.heads, self.num_experts, self.sums_heads = heads, num_experts, sums_heads
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_TAD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return `sum_k w_k * W_k x` for each head, `[T, A, out]`, or over all heads, `[T, out]`.

        Args:
            x_TAD: a row for each head, `[T, A, in]`, or one for all of them, `[T, 1, in]`.
            index_TK: expert ids, head by head: `[T, A * k]`.
            weight_TK: their weights, `[T, A * k]`.
        """
        T, K = index_TK.shape
        x_ND = x_TAD.repeat_interleave(K // x_TAD.shape[1], dim=1).flatten(0, 1)
        y_NO = self._project(x_ND, index_TK.flatten()) * weight_TK.reshape(-1, 1)
        y_TAKO = y_NO.view(T, self.heads, K // self.heads, -1)
        return y_TAKO.sum(dim=(1, 2) if self.sums_heads else 2)

    def _project(self, x_ND: Tensor, index_N: Tensor) -> Tensor:
        """Return each row times the matrix of its expert, `[N, out]`."""
        banks: Any = getattr(self, "esft", None)
        slot_N = index_N if banks is None else banks.slot[index_N]
        slot_N, order_N = slot_N.sort(stable=True)
        x_ND = x_ND[order_N]
        slots = torch.arange(self.num_experts, device=slot_N.device)
        end_E = torch.searchsorted(slot_N, slots, right=True, out_int32=True)
        if banks is None:
            y_NO = grouped_linear(x_ND, self.weight.transpose(1, 2), end_E)
        else:
            # Rows of the trained experts come first. No gradient of the others' matrices arises.
            trained, rest = banks.trained("weight"), banks.rest("weight")
            n = trained.shape[0]
            cut = int(end_E[n - 1]) if n else 0
            y_NO = torch.cat(
                [
                    grouped_linear(rows, stack.to(x_ND.dtype).transpose(1, 2), ends)
                    for rows, stack, ends in (
                        (x_ND[:cut], trained, end_E[:n]),
                        (x_ND[cut:], rest, end_E[n:] - cut),
                    )
                    if stack.shape[0]
                ]
            )
        return y_NO[order_N.argsort()]

"""Llama 4: the gate multiplies an expert's input, and all experts run on all tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, Self

import torch
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation

from esft.banks import AttachedExperts
from esft.layouts.layout import (
    Layout,
    Seen,
    beside,
    check_stacks,
    is_a,
    parent,
    restore_stacks,
    slices,
    split_stacks,
    stack_shapes,
)


class GatedInputLayout(Layout):
    """Stacks `[E, H, 2I]` and `[E, I, H]` that transformers multiplies densely (`bmm`).

    A token's input to an expert that it did not choose is zero there. While a selection is
    attached, the block runs the chosen experts only: `sum_k expert[k](w[t, k] * x[t])`.
    """

    takes_blocks = True

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """See `Layout.find`."""
        experts: Any = modules[name]
        if not is_a(experts, "Llama4TextExperts"):
            return None
        return cls(name, experts, modules[parent(name)], int(experts.num_experts))

    def shapes(self) -> dict[str, torch.Size]:
        """See `Layout.shapes`."""
        return stack_shapes(self.banks, dict(self.experts.named_parameters(recurse=False)))

    def weights(self) -> dict[str, Sequence[Tensor]]:
        """See `Layout.weights`."""
        return slices(dict(self.experts.named_parameters(recurse=False)))

    def input_first(self, name: str) -> bool:
        """See `Layout.input_first`."""
        return True

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        router: Any = self.router

        @beside
        def chosen(module: Any, _args: Any, output: Any) -> None:
            seen(*_chosen(module.top_k, *output))

        return router.register_forward_hook(chosen)

    def attach(self, selected: list[int], param_dtype: torch.dtype | None) -> None:
        """See `Layout.attach`."""
        split_stacks(self.experts, selected, param_dtype, self.num_experts)
        self.block.forward = MethodType(_block_forward, self.block)

    def detach(self) -> None:
        """See `Layout.detach`."""
        restore_stacks(self.experts)
        del self.block.forward  # of the object; that of its class comes back

    def refuse_unsupported(self) -> None:
        """See `Layout.refuse_unsupported`."""
        stacks = dict(self.experts.named_parameters(recurse=False))
        check_stacks(self, stacks, dict.fromkeys(stacks, self.num_experts))


def _chosen(top_k: int, scores_TE: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the K chosen experts of each token and their gates, as the router computed them."""
    index_TK = logits_TE.topk(top_k, dim=-1).indices
    return index_TK, scores_TE.gather(-1, index_TK)


def _block_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Run a `Llama4TextMoe` whose experts have a selection attached."""
    x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores_TE, logits_TE = self.router(x_TH)
    index_TK, weight_TK = _chosen(self.router.top_k, scores_TE, logits_TE)
    # Each choice is a token of its own, with one expert and its output unscaled.
    rows_NH = (x_TH[:, None] * weight_TK[..., None]).flatten(0, 1)
    ones_N1 = torch.ones_like(rows_NH[:, :1])
    out_NH = moe_mlp(rows_NH, index_TK.reshape(-1, 1), ones_N1, _bank(self.experts))
    routed_TH = out_NH.view(*index_TK.shape, -1).sum(dim=1)
    return self.shared_expert(x_TH) + routed_TH, logits_TE


def _bank(experts: Any) -> ExpertBank:
    banks: AttachedExperts = experts.esft

    def projection(name: str) -> Projection:
        return Projection(banks.trained(name), banks.rest(name), transposed=True)

    def gated(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return up * experts.act_fn(gate)

    silu = isinstance(experts.act_fn, (nn.SiLU, SiLUActivation))
    activation = SwiGLU() if silu else gated
    return ExpertBank(projection("gate_up_proj"), projection("down_proj"), banks.slot, activation)

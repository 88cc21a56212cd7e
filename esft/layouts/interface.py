"""Experts behind transformers' experts interface, as nearly every family has them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from esft.banks import AttachedExperts
from esft.errors import ModelError
from esft.held import HeldExperts
from esft.layouts.layout import (
    Layout,
    Seen,
    before_experts,
    check_stacks,
    parent,
    restore_stacks,
    slices,
    split_stacks,
    stack_shapes,
)

IMPLEMENTATION = "esft"


class InterfaceLayout(Layout):
    """Stacks `[E, ...]` on a module whose class went through `use_experts_implementation`.

    That gives it the layout flags `is_transposed`, `is_concatenated`, `has_gate`, `has_bias`, and
    a forward pass that is looked up in a registry by a name in its config.
    """

    takes_blocks = True

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """See `Layout.find`."""
        module = modules[name]
        if not (hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")):
            return None
        attached: AttachedExperts | None = getattr(module, "esft", None)
        stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        E = stacked[0] if attached is None else _experts_of(attached)
        layout = cls(name, module, modules[parent(name)], E)
        # A router with more classes than experts sends some tokens to none of them (ZAYA).
        layout.others = getattr(layout.router, "num_router_classes", E) > E
        return layout

    def shapes(self) -> dict[str, torch.Size]:
        """See `Layout.shapes`."""
        return stack_shapes(self.banks, dict(self.experts.named_parameters(recurse=False)))

    def weights(self) -> dict[str, Sequence[Tensor]]:
        """See `Layout.weights`."""
        return slices(dict(self.experts.named_parameters(recurse=False)))

    def input_first(self, name: str) -> bool:
        """See `Layout.input_first`."""
        return bool(self.experts.is_transposed)

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        if not self.others:
            return before_experts(self.experts, seen)

        def without_skips(index: Tensor, weight: Tensor) -> None:
            # Such a router writes expert 0 with weight 0 where it chose none.
            seen(index.masked_fill(weight == 0, self.num_experts), weight)

        return before_experts(self.experts, without_skips)

    def attach(self, selected: list[int], param_dtype: torch.dtype | None) -> None:
        """See `Layout.attach`."""
        experts = self.experts
        held = HeldExperts.of(self.name, experts)
        if held is None:
            banks = split_stacks(experts, selected, param_dtype, self.num_experts)
        else:
            held.keep(experts)
            here = held.ids_here(selected)
            banks = split_stacks(experts, here, param_dtype, held.here)
            banks.held, banks.everywhere = held, list(selected)
            # Also where none is here: what has a gradient, decides which collectives run.
            for bank in banks.trainable.values():
                bank.requires_grad_(bool(selected))
        # The interface dispatches on the module's config: with a copy of its own, this layer alone
        # changes, and the model's config keeps what the user asked for.
        banks.original_config = experts.config
        config = copy.copy(experts.config)
        config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
        experts.config = config

    def detach(self) -> None:
        """See `Layout.detach`."""
        experts: Any = self.experts
        experts.config = experts.esft.original_config
        restore_stacks(experts)

    def refuse_unsupported(self) -> None:
        """See `Layout.refuse_unsupported`."""
        if getattr(self.experts, "has_post_expert_norm", False):
            raise ModelError(f"{self.name}: experts with a norm after them are not supported yet")
        HeldExperts.of(self.name, self.experts)
        stacks = dict(self.experts.named_parameters(recurse=False))
        check_stacks(self, stacks, dict.fromkeys(stacks, self.num_experts))


def _experts_of(attached: AttachedExperts) -> int:
    """Return how many experts the layer has that banks are attached to: E."""
    if attached.held is None:
        return attached.slot.shape[0]
    return next(iter(attached.held.shapes.values()))[0]


def expert_bank(
    experts: nn.Module,
    trainable: Mapping[str, Tensor],
    frozen: Mapping[str, Any],
    slot: Tensor,
) -> ExpertBank:
    """Put two banks together as `moe_mlp` takes them, with the layout of the experts module.

    Args:
        experts: follows the experts interface.
        trainable: name of the stack -> `[n, ...]`.
        frozen: name of the stack -> `[E - n, ...]`, a tensor or a `Quantised`; biases are tensors.
        slot: `[E]` int64, see `esft_kernels.ExpertBank`.
    """

    def projection(name: str) -> Projection:
        bias = f"{name}_bias"
        return Projection(
            trainable[name],
            frozen[name],
            bool(experts.is_transposed),
            trainable.get(bias),
            frozen.get(bias),
        )

    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return ExpertBank(projection(up), projection("down_proj"), slot, _activation(experts))


def attached_bank(experts: nn.Module) -> ExpertBank:
    """Return the banks of a module that has a selection attached."""
    banks: AttachedExperts = experts.esft  # type: ignore[assignment]
    trained = {name: banks.trained(name) for name in banks.names}
    rest = {name: banks.rest(name) for name in banks.names}
    return expert_bank(experts, trained, rest, banks.slot)


def _whole_bank(experts: nn.Module) -> ExpertBank:
    """Return a module's own stacks as one bank: of `experts_implementation="esft"` by itself."""
    stacks = dict(experts.named_parameters(recurse=False))
    none = {name: stack[:0] for name, stack in stacks.items()}
    trains = any(stack.requires_grad for stack in stacks.values())
    trainable, frozen = (stacks, none) if trains else (none, stacks)
    first = next(iter(stacks.values()))
    slot = torch.arange(first.shape[0], device=first.device)
    return expert_bank(experts, trainable, frozen, slot)


def _activation(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what an experts module applies between its projections."""
    if not experts.has_gate:
        return experts.act_fn  # type: ignore[return-value]
    apply_gate: Callable[[Tensor], Tensor] = experts._apply_gate  # type: ignore[assignment]
    stock = getattr(apply_gate, "__func__", None) is _default_apply_gate
    if stock and isinstance(experts.act_fn, (nn.SiLU, SiLUActivation)):
        return SwiGLU()  # the same function, under the name that the kernels know
    return apply_gate


def _experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an experts module. Signature of the experts interface."""
    bank = attached_bank(self) if hasattr(self, "esft") else _whole_bank(self)
    return moe_mlp(hidden_states, top_k_index, top_k_weights, bank)


ExpertsInterface.register(IMPLEMENTATION, _experts_forward)

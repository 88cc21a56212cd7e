"""Routed projections of the attention, in models of esft's own (MoEUT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.banks import AttachedExperts, Split
from esft.layouts.layout import (
    Layout,
    Seen,
    before_experts,
    check_stacks,
    is_a,
    parent,
    show_stacks,
    slices,
    stack_shapes,
)


class ProjectionLayout(Layout):
    """`esft.models.projection.ProjectionExperts`: one stack; its forward knows of the banks."""

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """See `Layout.find`."""
        module: Any = modules[name]
        if not is_a(module, "ProjectionExperts"):
            return None
        return cls(name, module, modules[parent(name)], module.num_experts)

    def shapes(self) -> dict[str, torch.Size]:
        """See `Layout.shapes`."""
        return stack_shapes(self.banks, self._stacks())

    def weights(self) -> dict[str, Sequence[Tensor]]:
        """See `Layout.weights`."""
        return slices(self._stacks())

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        return before_experts(self.experts, seen)

    def attach(self, selected: list[int], param_dtype: torch.dtype | None) -> None:
        """See `Layout.attach`."""
        split = Split.of(self._stacks(), selected)
        banks = AttachedExperts(split, selected, param_dtype, self.num_experts)
        del self.experts._parameters["weight"]
        self.experts.esft = banks
        banks.hooks = [show_stacks(self.experts)]

    def detach(self) -> None:
        """See `Layout.detach`."""
        banks: Any = self.banks
        weight = nn.Parameter(banks.stacked("weight"), requires_grad=False)
        self.experts.register_parameter("weight", weight)
        banks.unhook()
        del self.experts.esft

    def refuse_unsupported(self) -> None:
        """See `Layout.refuse_unsupported`."""
        check_stacks(self, self._stacks(), {"weight": self.num_experts})

    def _stacks(self) -> dict[str, Tensor]:
        """Return the stack of a layer that has nothing attached, by name."""
        return dict(self.experts.named_parameters(recurse=False))

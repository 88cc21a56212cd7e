"""Stacks of experts outside the experts interface, in families that take one expert at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.banks import AttachedExperts, ExpertStack, Split, touched
from esft.layouts.layout import (
    Layout,
    Seen,
    before_experts,
    beside,
    check_stacks,
    is_a,
    parent,
    show_stacks,
    slices,
    stack_shapes,
)


class StacksLayout(Layout):
    """Stacks that the family's own forward indexes by expert; it stays in place.

    Attaching puts an `esft.banks.ExpertStack` where each stack was.
    """

    class_name: ClassVar[str]
    """Of the module that holds the stacks."""
    paths: ClassVar[tuple[str, ...]]
    """Of the stacks, under that module."""

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """See `Layout.find`."""
        if not is_a(modules[name], cls.class_name):
            return None
        return cls(name, modules[name], modules[parent(name)], cls.count(modules[name]))

    @staticmethod
    def count(experts: Any) -> int:
        """Return E."""
        return int(experts.num_experts)

    def rows(self) -> dict[str, int]:
        """Return how many slices each stack has, by path: E, or more."""
        return dict.fromkeys(self.paths, self.num_experts)

    def shapes(self) -> dict[str, torch.Size]:
        """See `Layout.shapes`."""
        return stack_shapes(self.banks, {} if self.banks else self._stacks())

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
        self.host.esft = banks
        for path in self.paths:
            owner, name = _owner(self.experts, path)
            del owner._parameters[name]
            setattr(owner, name, ExpertStack(banks, path))
        banks.hooks = [
            show_stacks(self.host, self.disk_rows()),
            self.host.register_forward_pre_hook(_refresh),
            self.host.register_forward_hook(_release),
        ]

    def detach(self) -> None:
        """See `Layout.detach`."""
        banks: Any = self.banks
        for path in self.paths:
            owner, name = _owner(self.experts, path)
            delattr(owner, name)
            stack = banks.stacked(path)
            if self.disk_rows() is not None:
                stack = stack.flatten(0, 1)
            owner.register_parameter(name, nn.Parameter(stack, requires_grad=False))
        banks.unhook()
        del self.host.esft

    def refuse_unsupported(self) -> None:
        """See `Layout.refuse_unsupported`."""
        check_stacks(self, self._stacks(), self.rows())

    def _stacks(self) -> dict[str, Tensor]:
        """Return the stacks of a layer that has nothing attached, `[E, ...]`."""
        each = self.disk_rows()
        stacks = {path: self.experts.get_parameter(path) for path in self.paths}
        if each is None:
            return stacks  # type: ignore[return-value]
        return {path: stack.unflatten(0, (-1, each)) for path, stack in stacks.items()}


class DbrxLayout(StacksLayout):
    """DBRX: `w1`, `v1` and `w2` are `[E * F, D]`; an expert has F rows of each."""

    class_name = "DbrxExperts"
    paths = ("mlp.w1", "mlp.v1", "mlp.w2")

    def input_first(self, name: str) -> bool:
        """See `Layout.input_first`."""
        return name == "mlp.w2"

    def disk_rows(self) -> int:
        """See `Layout.disk_rows`."""
        return int(self.experts.ffn_hidden_size)  # type: ignore[arg-type]


class LongcatLayout(StacksLayout):
    """LongCat-Flash: ids from E on are zero-computation experts, which return their input.

    The stack `gate_up_proj` has rows for them too, which are never used.
    """

    class_name = "LongcatFlashExperts"
    paths = ("gate_up_proj", "down_proj")
    others = True

    @staticmethod
    def count(experts: Any) -> int:
        """Return E, without the zero-computation experts."""
        return int(experts.num_routed_experts)

    def rows(self) -> dict[str, int]:
        """See `StacksLayout.rows`."""
        total: int = self.experts.total_experts  # type: ignore[assignment]
        return {"gate_up_proj": total, "down_proj": self.num_experts}


class Step3Layout(StacksLayout):
    """Step-3.5 and 3.7: stacks as behind the experts interface, called as there, but outside it."""

    class_name = "Step3p7Experts"
    paths = ("gate_up_proj", "down_proj")


class JetMoeLayout(StacksLayout):
    """JetMoE's feed-forward experts: two `JetMoeParallelExperts` in the block itself.

    Its attention experts are of another class; they stay frozen.
    """

    class_name = "JetMoeMoE"
    paths = ("input_linear.weight", "output_linear.weight")

    @classmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """See `Layout.find`."""
        block = modules[name]
        if not is_a(block, cls.class_name):
            return None
        return cls(name, block, block, cls.count(block.input_linear))

    def observe(self, seen: Seen) -> RemovableHandle:
        """See `Layout.observe`."""
        router: Any = self.router

        @beside
        def ungrouped(_module: nn.Module, _args: Any, output: Any) -> None:
            # The router returns the N = T * K choices grouped by expert: where each was in
            # `[T, K]`, its gate, and how many each expert has.
            place_N, _, gate_N, sizes, _ = output
            sizes_E = torch.tensor(sizes, device=gate_N.device)
            expert_N = torch.arange(len(sizes), device=gate_N.device).repeat_interleave(
                sizes_E, output_size=len(place_N)
            )
            index = torch.empty_like(place_N).scatter_(0, place_N, expert_N)
            weight = torch.empty_like(gate_N).scatter_(0, place_N, gate_N)
            seen(index.view(-1, router.top_k), weight.view(-1, router.top_k))

        return router.register_forward_hook(ungrouped)


def _owner(experts: nn.Module, path: str) -> tuple[Any, str]:
    module, _, name = path.rpartition(".")
    return experts.get_submodule(module), name


# Found from the module alone, so that a copy of the model works by itself.


def _expert_stacks(experts: Any) -> Iterator[ExpertStack]:
    for path in experts.esft.names:
        owner, name = _owner(experts, path)
        yield getattr(owner, name)


def _refresh(experts: nn.Module, *_: object) -> None:
    for stack in _expert_stacks(experts):
        stack.refresh()


def _release(experts: Any, _args: object, output: Any) -> Any:
    for stack in _expert_stacks(experts):
        stack.release()
    return touched(experts.esft, output)

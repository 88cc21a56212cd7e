"""The contract that every layout keeps."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.banks import AttachedExperts, Split, TrainedExperts
from esft.errors import ModelError

UNREAD = "esft_unread"
"""Of a module whose stacks are on the meta device: reads them, split by the selected experts' ids.

A model with frozen experts in few bits is loaded so (`esft.quantising.checkpoint`)."""

_GATE_SCALES = ("routed_scaling_factor", "router_scaling_factor", "route_scale")

# Called with what a router chose for T tokens: expert ids and weights, `[T, K]` or `[B, S, K]`.
Seen = Callable[[Tensor, Tensor], None]


class Layout(ABC):
    """One layer's routed experts: where their weights are, how they are called and seen.

    Attributes:
        name: path of the experts in the model.
        experts: the module at that path.
        block: the module around it; it holds the router too.
        router: the module that chooses the experts, or None if there is none.
        num_experts: E, those that can be selected.
        others: whether the router may choose something that is none of them: the input itself, or
            nothing. Its ids are then outside 0 to E - 1.
        top_k: K, where neither the router nor the configuration tells it.
        takes_blocks: whether frozen experts may be kept in few bits (`esft_kernels.quantised`).
    """

    takes_blocks: ClassVar[bool] = False
    others: bool = False
    top_k: int | None = None
    router_names: ClassVar[tuple[str, ...]] = ("gate", "router")

    def __init__(self, name: str, experts: nn.Module, block: nn.Module, num_experts: int) -> None:
        self.name = name
        self.experts = experts
        self.block = block
        self.num_experts = num_experts
        self.router = self._router()

    @classmethod
    @abstractmethod
    def find(cls, name: str, modules: Mapping[str, nn.Module]) -> Self | None:
        """Return the layout of the module called `name`, or None if it does not hold experts."""

    @property
    def host(self) -> nn.Module:
        """The module that runs the experts; while a selection is attached, `esft` is its child."""
        return self.experts

    @property
    def banks(self) -> TrainedExperts | None:
        """What is attached, if anything."""
        return getattr(self.host, "esft", None)

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Return the experts' weights: path under `name` -> `[E, ...]`, attached or not.

        The first number may be more than E, where a family's code has rows that it never uses.
        """

    @abstractmethod
    def weights(self) -> dict[str, Sequence[Tensor]]:
        """Return each expert's slice of each weight, to be written to; nothing is attached."""

    def input_first(self, name: str) -> bool:
        """Whether an expert's slice of a weight is `[in, out]` and not `[out, in]`."""
        return False

    @abstractmethod
    def observe(self, seen: Seen) -> RemovableHandle:
        """Call `seen` at every forward pass with what the router chose.

        The weights have the gradient that the router gave them.
        """

    @abstractmethod
    def attach(self, selected: list[int], param_dtype: torch.dtype | None) -> None:
        """Split the experts' weights into trained and frozen ones; see `esft.experts.attach`.

        Raises:
            ModelError: the weights are not floats, one slice an expert.
        """

    @abstractmethod
    def detach(self) -> None:
        """Put trained weights back, in the frozen ones' dtype."""

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Return the model's own names of a weight: of the stack, or of each expert's by id."""
        return (f"{self.name}.{name}",)

    @property
    def gate_scale(self) -> float:
        """A constant that the router multiplies into the weights; gate values are without it."""
        # On the router it is multiplied into the weights that the experts receive; a factor that
        # lives on the block is applied to the experts' output, where the weights do not show it.
        for name in _GATE_SCALES:
            value = getattr(self.router, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
        return 1.0

    def disk_rows(self) -> int | None:
        """Return how many rows an expert has in a tensor on disk, where that is not cut by expert.

        None if a tensor `[E, ...]` has one slice an expert, or each expert has its own tensor.
        """
        return None

    @abstractmethod
    def refuse_unsupported(self) -> None:
        """Check that a selection can be attached.

        Raises:
            ModelError: it cannot; says why.
        """

    def _router(self) -> nn.Module | None:
        # transformers calls it `gate` or `router`; both name a linear layer in some dense blocks,
        # but those have no experts beside them.
        for name in self.router_names:
            child = getattr(self.block, name, None)
            if isinstance(child, nn.Module):
                return child
        return None


def before_experts(experts: nn.Module, seen: Seen) -> RemovableHandle:
    """Observe experts that are called with `(hidden, top_k_index, top_k_weights)`."""
    return experts.register_forward_pre_hook(lambda _module, args: seen(*args[1:3]))


def beside(look: Callable[..., None]) -> Callable[..., None]:
    """Keep what an observer computes with gradients apart from what the model computes.

    Gradient checkpointing counts the tensors that a layer saves, and runs the layer again for
    them: then without the observer, whose tensors would be missing.
    """

    @functools.wraps(look)
    def apart(*args: Any) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            look(*args)

    return apart


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether a module is of a class of one of these names, or of one derived from it."""
    return any(kind.__name__ in names for kind in type(module).__mro__)


def parent(name: str) -> str:
    """Return the path of the module around another."""
    return name.rpartition(".")[0]


def check_stacks(layout: Layout, stacks: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Check that every weight is a float stack with a slice for each expert.

    Args:
        layout: whose stacks these are.
        stacks: by name.
        rows: how many slices each must have, by name.

    Raises:
        ModelError: one is not; quantisers leave such.
    """
    for name, weight in stacks.items():
        if weight.shape[0] != rows[name] or not weight.is_floating_point():
            raise ModelError(
                f"{layout.name}.{name}: not a float stack of {layout.num_experts} experts "
                f"(shape {list(weight.shape)}, {weight.dtype}); quantised experts cannot train"
            )


def stack_shapes(
    banks: TrainedExperts | None, stacks: Mapping[str, Tensor]
) -> dict[str, torch.Size]:
    """Return the shapes of stacks, whether they are in two banks at the moment or whole."""
    if isinstance(banks, AttachedExperts):
        return {name: banks.shape(name) for name in banks.names}
    return {name: stack.shape for name, stack in stacks.items()}


def slices(stacks: Mapping[str, Tensor]) -> dict[str, Sequence[Tensor]]:
    """Cut stacks `[E, ...]` by expert, without copying."""
    return {name: stack.detach().unbind() for name, stack in stacks.items()}


def split_stacks(
    host: nn.Module, selected: list[int], param_dtype: torch.dtype | None, num_experts: int
) -> AttachedExperts:
    """Replace a module's own stacks `[E, ...]` by two banks, as `host.esft`, and return these."""
    stacks = dict(host.named_parameters(recurse=False))
    read: Callable[[list[int]], Split] | None = host.__dict__.pop(UNREAD, None)
    split = Split.of(stacks, selected) if read is None else read(selected)
    banks = AttachedExperts(split, selected, param_dtype, num_experts)
    for name in stacks:
        del host._parameters[name]
    host.esft = banks
    banks.hooks = [show_stacks(host)]
    return banks


def restore_stacks(host: nn.Module) -> None:
    """Undo `split_stacks`; trained weights are put back in the frozen ones' dtype."""
    banks: AttachedExperts = host.esft  # type: ignore[assignment]
    for name in banks.names:
        host.register_parameter(name, nn.Parameter(banks.stacked(name), requires_grad=False))
    banks.unhook()
    del host.esft


def show_stacks(host: nn.Module, each: int | None = None) -> RemovableHandle:
    """Show attached stacks under their own names in a state dict, so that it can be saved.

    Args:
        host: has the banks as `esft`; the stacks' names are paths under it.
        each: rows of an expert, for stacks that the family keeps as `[E * each, ...]`.
    """

    def hook(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
        banks: AttachedExperts = module.esft  # type: ignore[assignment]
        for name in [key for key in state if key.startswith(f"{prefix}esft.")]:
            del state[name]
        for name in banks.names:
            stack = banks.stacked(name)
            state[prefix + name] = stack if each is None else stack.flatten(0, 1)

    return host.register_state_dict_post_hook(hook)

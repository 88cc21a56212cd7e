"""Where a layer's selected experts live while they train: small parameters of their own, in fp32.

No gradient, gradient buffer or optimizer state of another expert can exist, because there is no
parameter that could hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from esft_kernels.bank import frozen_ids, slot_map
from esft_kernels.quantised import Quantised
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.errors import ModelError
from esft.held import HeldExperts
from esft.quantising.stored import StoredWeight


class TrainedExperts(nn.Module):
    """The selected experts of a layer. Lives at `esft` of the module that computes the experts.

    Attributes:
        selected: ids of the n experts that train, in the selection's order.
        everywhere: those of the whole layer, where processes share its experts.
        hooks: what attaching registered on the model's modules.
        dtypes: of the weights before, and in what is saved, by name; where no frozen bank tells.
        trainable: name of a weight -> `[n, ...]`, the only parameters with a gradient. A name is a
            path under the layer's experts; dots in it are written as slashes.
        low_rank: name of a weight -> the `esft.low_rank.LowRank` that trains in its place, if
            any; names as in `trainable`.
    """

    def __init__(
        self, chosen: Mapping[str, Tensor], selected: list[int], param_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.selected = self.everywhere = list(selected)
        self.hooks: list[RemovableHandle] = []
        self.dtypes: dict[str, torch.dtype] = {}
        self.trainable = nn.ParameterDict()
        self.low_rank = nn.ModuleDict()
        for name, weight in chosen.items():
            own = weight.detach().to(param_dtype)
            self.trainable[_key(name)] = nn.Parameter(own, requires_grad=bool(selected))

    @property
    def names(self) -> list[str]:
        """Name the weights that an expert has, as paths under the layer's experts."""
        return [_name(key) for key in self.trainable]

    def unhook(self) -> None:
        """Remove what was registered on the model's modules while the banks were attached."""
        for hook in self.hooks:
            hook.remove()

    def bank(self, name: str) -> Tensor:
        """Return a weight of the selected experts without what its factors add: `[n, ...]`."""
        bank: Tensor = self.trainable[_key(name)]
        return bank

    def trained(self, name: str) -> Tensor:
        """Return a weight of the selected experts: `[n, ...]`."""
        factors = self.factors(name)
        return self.bank(name) if factors is None else factors(self.bank(name))

    def collected(self, name: str) -> Tensor | None:
        """Return it of all the selected experts, also those that other processes hold.

        All of these must call this; those that are not the main one get None.
        """
        return self.trained(name).detach()

    def factors(self, name: str) -> nn.Module | None:
        """Return the low-rank factors of a weight, or None if it trains as a whole."""
        if (key := _key(name)) in self.low_rank:
            return self.low_rank[key]
        return None

    def add_factors(self, name: str, factors: nn.Module) -> None:
        """Let a weight be the bank's plus what `factors` computes."""
        self.low_rank[_key(name)] = factors


@dataclass(frozen=True)
class Split:
    """A layer's stacks `[E, ...]`, cut in two by a selection of n experts.

    Attributes:
        chosen: name of the stack -> `[n, ...]`, in the selection's order.
        rest: name of the stack -> `[E - n, ...]`, by ascending id. A stack may have more rows than
            the layer has experts; those follow the last expert's.
    """

    chosen: Mapping[str, Tensor]
    rest: Mapping[str, Tensor | Quantised]

    @classmethod
    def of(cls, stacks: Mapping[str, Tensor], selected: list[int]) -> Self:
        """Cut stacks, by copying; a layer without a selected expert keeps them as they are."""
        chosen, rest = {}, {}
        for name, stack in stacks.items():
            ids = torch.tensor(selected, dtype=torch.int64, device=stack.device)
            others = torch.tensor(frozen_ids(selected, stack.shape[0]), dtype=torch.int64)
            stack = stack.detach()
            chosen[name] = stack.index_select(0, ids)
            rest[name] = stack.index_select(0, others.to(stack.device)) if selected else stack
        return cls(chosen, rest)


class AttachedExperts(TrainedExperts):
    """A layer's stacked expert weights, split by a selection into two banks.

    Attributes:
        frozen: name of the stack -> `[E - n, ...]`, as in `Split.rest`.
        stored: likewise, of the stacks that are kept in few bits.
        held: which part of the stacks this process holds, if processes share them: E, `selected`
            and `slot` are then of the experts that are here.
        slot: `[E]` int64, see `esft_kernels.ExpertBank`.
    """

    slot: Tensor

    def __init__(
        self,
        split: Split,
        selected: list[int],
        param_dtype: torch.dtype | None,
        num_experts: int,
    ) -> None:
        super().__init__(split.chosen, selected, param_dtype)
        self.frozen, self.stored = nn.ParameterDict(), nn.ModuleDict()
        for name, rest in split.rest.items():
            if isinstance(rest, Quantised):
                self.stored[_key(name)] = StoredWeight(rest)
            else:
                self.frozen[_key(name)] = nn.Parameter(rest.detach(), requires_grad=False)
        device = next(iter(split.chosen.values())).device
        self.register_buffer("slot", slot_map(selected, num_experts, device), persistent=False)
        self.held: HeldExperts | None = None

    def rest(self, name: str) -> Tensor | Quantised:
        """Return a weight of the experts that do not train: `[E - n, ...]`."""
        if (key := _key(name)) in self.stored:
            return self.stored[key].value  # type: ignore[return-value]
        bank: Tensor = self.frozen[key]
        return bank

    def whole_rest(self, name: str) -> Tensor:
        """Return it as plain numbers, as loaded.

        Raises:
            ModelError: it is kept in few bits, which do not tell what was loaded.
        """
        rest = self.rest(name)
        if isinstance(rest, Quantised):
            raise ModelError(
                f"{name}: the frozen experts are kept in {rest.kind} (frozen_dtype), so this "
                f"model's weights cannot be saved or put back whole; save what trained as a delta, "
                f"and merge that into the base"
            )
        return rest

    def shape(self, name: str) -> torch.Size:
        """Return the shape that the stack had before it was split: `[E, ...]`."""
        if self.held is not None:
            return self.held.shapes[name]
        return torch.Size([self._rows(name), *self.rest(name).shape[1:]])

    def stacked(self, name: str) -> Tensor:
        """Return one stack in the experts' own order and the frozen bank's dtype: `[E, ...]`."""
        frozen = self.whole_rest(name).detach()
        trained = self.trained(name).detach().to(frozen.dtype)
        slot = slot_map(self.selected, self._rows(name), frozen.device)
        stack = torch.cat([trained, frozen]).index_select(0, slot)
        return stack if self.held is None else self.held.shared(name, stack)

    def collected(self, name: str) -> Tensor | None:
        """See `TrainedExperts.collected`."""
        if self.held is None:
            return super().collected(name)
        return self.held.collected(name, self.trained(name).detach(), self.everywhere)

    def _rows(self, name: str) -> int:
        """Return how many experts' slices of a stack are here."""
        return self.bank(name).shape[0] + self.rest(name).shape[0]


class _Touched(torch.autograd.Function):
    """Passes a tensor on as it is, and gives weights a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *weights: Tensor) -> Tensor:
        ctx.empty = [weight.new_empty(0) for weight in weights]
        ctx.shapes = [weight.shape for weight in weights]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(ctx.empty, ctx.shapes, strict=True)
        return grad, *(empty.new_zeros(shape) for empty, shape in pairs)


def touched(banks: TrainedExperts, output: Any) -> Any:
    """Return what a layer's experts returned, with every trained weight behind it.

    A family's own code leaves out the experts that no token chose. Where it left out all that
    train, a loss may have nothing to train at all; and of several processes one that has no
    gradient for a layer would keep the others waiting.

    Args:
        banks: of the layer.
        output: a tensor, or a tuple that begins with one.
    """
    weights = [weight for weight in banks.parameters() if weight.requires_grad]
    if not weights or not torch.is_grad_enabled():
        return output
    if isinstance(output, tuple):
        return _Touched.apply(output[0], *weights), *output[1:]
    return _Touched.apply(output, *weights)


class ExpertStack:
    """Stands in for a stack `[E, ...]` where a family's own code takes one expert at a time.

    `stack[expert]` is the expert's slice, from the trainable bank or the frozen one. `refresh`
    must be called before each forward pass: it cuts the trainable bank once, so that its gradient
    is put together once, and no buffer of the whole stack's size arises.
    """

    def __init__(self, banks: AttachedExperts, name: str) -> None:
        self._banks, self._name = banks, name
        self._slot = {expert: slot for slot, expert in enumerate(banks.selected)}
        rest = frozen_ids(banks.selected, banks.shape(name)[0])
        self._frozen = {expert: slot for slot, expert in enumerate(rest)}
        self._cut: tuple[Tensor, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """What the family computes in."""
        return self._banks.whole_rest(self._name).dtype

    def refresh(self) -> None:
        """Cut the trainable bank for the forward pass to come."""
        self._cut = self._banks.trained(self._name).unbind()

    def release(self) -> None:
        """Let go of the last forward pass."""
        self._cut = ()

    def view(self, *_shape: object) -> ExpertStack:
        """Return itself: it is cut by expert already, as a caller of `view` is about to do."""
        return self

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        expert = int(expert)
        if expert in self._slot:
            return self._cut[self._slot[expert]].to(self.dtype)
        return self._banks.whole_rest(self._name)[self._frozen[expert]]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's own name has no dots


def _name(key: str) -> str:
    return key.replace("/", ".")

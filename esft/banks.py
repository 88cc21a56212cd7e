"""Where a layer's selected experts live while they train: small parameters of their own, in fp32.

No gradient, gradient buffer or optimizer state of another expert can exist, because there is no
parameter that could hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from esft_kernels.bank import frozen_ids, slot_map
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class TrainedExperts(nn.Module):
    """The selected experts of a layer. Lives at `esft` of the module that computes the experts.

    Attributes:
        selected: ids of the n experts that train, in the selection's order.
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
        self.selected = list(selected)
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

    def factors(self, name: str) -> nn.Module | None:
        """Return the low-rank factors of a weight, or None if it trains as a whole."""
        if (key := _key(name)) in self.low_rank:
            return self.low_rank[key]
        return None

    def add_factors(self, name: str, factors: nn.Module) -> None:
        """Let a weight be the bank's plus what `factors` computes."""
        self.low_rank[_key(name)] = factors


class AttachedExperts(TrainedExperts):
    """A layer's stacked expert weights, split by a selection into two banks.

    Attributes:
        frozen: name of the stack -> `[E - n, ...]`, by ascending id. A stack may have more rows
            than the layer has experts; those follow the last expert's.
        slot: `[E]` int64, see `esft_kernels.ExpertBank`.
    """

    slot: Tensor

    def __init__(
        self,
        stacks: Mapping[str, Tensor],
        selected: list[int],
        param_dtype: torch.dtype | None,
        num_experts: int,
    ) -> None:
        device = next(iter(stacks.values())).device
        chosen = torch.tensor(selected, dtype=torch.int64, device=device)
        super().__init__(
            {name: stack.detach().index_select(0, chosen) for name, stack in stacks.items()},
            selected,
            param_dtype,
        )
        self.frozen = nn.ParameterDict()
        for name, stack in stacks.items():
            rest = torch.tensor(frozen_ids(selected, stack.shape[0]), dtype=torch.int64)
            # A layer without a selected expert keeps its stack as it is, uncopied.
            frozen = stack.detach().index_select(0, rest.to(device)) if selected else stack.detach()
            self.frozen[_key(name)] = nn.Parameter(frozen, requires_grad=False)
        self.register_buffer("slot", slot_map(selected, num_experts, device), persistent=False)

    def rest(self, name: str) -> Tensor:
        """Return a weight of the experts that do not train: `[E - n, ...]`."""
        bank: Tensor = self.frozen[_key(name)]
        return bank

    def shape(self, name: str) -> torch.Size:
        """Return the shape that the stack had before it was split: `[E, ...]`."""
        bank, rest = self.bank(name), self.rest(name)
        return torch.Size([bank.shape[0] + rest.shape[0], *rest.shape[1:]])

    def stacked(self, name: str) -> Tensor:
        """Return one stack in the experts' own order and the frozen bank's dtype: `[E, ...]`."""
        frozen = self.rest(name).detach()
        trained = self.trained(name).detach().to(frozen.dtype)
        slot = slot_map(self.selected, self.shape(name)[0], frozen.device)
        return torch.cat([trained, frozen]).index_select(0, slot)


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
        return self._banks.rest(self._name).dtype

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
        return self._banks.rest(self._name)[self._frozen[expert]]


def _key(name: str) -> str:
    return name.replace(".", "/")  # a parameter's own name has no dots


def _name(key: str) -> str:
    return key.replace("/", ".")

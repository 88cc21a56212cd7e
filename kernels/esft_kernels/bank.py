"""A layer's experts in two banks: those that train, numbered first, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """One linear map per expert, split into a trainable and a frozen bank.

    Attributes:
        trainable: weights of the n selected experts, `[n, out, in]`, in any float dtype (fp32 by
            choice: small updates vanish in bf16). The only tensor that receives a gradient.
        frozen: weights of the others, `[E - n, out, in]`; never copied.
        transposed: whether weights are stored `[.., in, out]` instead of `[.., out, in]`.
        trainable_bias: `[n, out]` or None.
        frozen_bias: `[E - n, out]` or None.
    """

    trainable: Tensor
    frozen: Tensor
    transposed: bool = False
    trainable_bias: Tensor | None = None
    frozen_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertBank:
    """A layer's experts: two projections, the activation between them, and the slot of each.

    Attributes:
        up: hidden to inner; with a gate its output holds both halves, `[N, 2I]`, else `[N, I]`.
        down: inner to hidden.
        slot: `[E]` int64; `slot[e]` is expert e's place once the n selected ones come first:
            below n it is a row of the trainable bank, else `slot[e] - n` one of the frozen bank.
        activation: maps the up projection's output `[N, 2I]` to `[N, I]`, row by row and free of
            parameters; the backward differentiates it by autograd.
    """

    up: Projection
    down: Projection
    slot: Tensor
    activation: Callable[[Tensor], Tensor]

    @property
    def num_selected(self) -> int:
        """How many experts train: n."""
        return self.up.trainable.shape[0]

    @property
    def num_experts(self) -> int:
        """How many experts there are: E."""
        return self.slot.shape[0]


def slot_map(selected: list[int], num_experts: int, device: torch.device | None = None) -> Tensor:
    """Number the selected experts first, in their order, then the others by ascending id.

    Args:
        selected: n different expert ids.
        num_experts: E.
        device: where the result lives.

    Returns:
        `[E]` int64, expert id -> slot.
    """
    order = [*selected, *frozen_ids(selected, num_experts)]
    slot = torch.empty(num_experts, dtype=torch.int64)
    slot[torch.tensor(order, dtype=torch.int64)] = torch.arange(num_experts)
    return slot.to(device)


def frozen_ids(selected: list[int], num_experts: int) -> list[int]:
    """Return the ids that are not selected, ascending: the order of the frozen bank."""
    chosen = set(selected)
    return [expert for expert in range(num_experts) if expert not in chosen]

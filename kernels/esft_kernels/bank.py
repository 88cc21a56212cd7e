"""A layer's experts in two banks: those that train, numbered first, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esft_kernels.quantised.storage import Quantised


@dataclass(frozen=True)
class StoredMatrices:
    """Matrices `[G, in, out]` in few bits, computed anew each time they are multiplied by.

    Attributes:
        stored: a frozen bank.
        flipped: whether a matrix is the transpose of what is stored.
    """

    stored: Quantised
    flipped: bool

    @property
    def shape(self) -> torch.Size:
        """`[G, in, out]`."""
        experts, *inner = self.stored.shape
        return torch.Size([experts, *(reversed(inner) if self.flipped else inner)])

    def __getitem__(self, expert: int) -> Tensor:
        """Compute one matrix: `[in, out]`."""
        return self.orient(self.stored[expert].dequantise())

    def orient(self, dense: Tensor) -> Tensor:
        """Return stored matrices, once dequantised, as they are multiplied by."""
        return dense.transpose(-2, -1) if self.flipped else dense

    def transpose(self, *_dimensions: int) -> StoredMatrices:
        """Return the transposed matrices."""
        return StoredMatrices(self.stored, not self.flipped)


@dataclass(frozen=True)
class Matrices:
    """A projection in the compute dtype, laid out to be multiplied by: `y = x @ matrix + bias`.

    Attributes:
        trainable: `[n, in, out]`, any strides.
        frozen: `[E - n, in, out]`, a view of the frozen bank; or its stored form.
        trainable_bias: `[n, out]`, contiguous, or None.
        frozen_bias: `[E - n, out]`, contiguous, or None.
    """

    trainable: Tensor
    frozen: Tensor | StoredMatrices
    trainable_bias: Tensor | None = None
    frozen_bias: Tensor | None = None

    def transpose(self) -> Matrices:
        """Return what gradients are multiplied by: `dx = dy @ matrix.T`, without a bias."""
        return Matrices(self.trainable.transpose(-2, -1), self.frozen.transpose(-2, -1))


@dataclass(frozen=True)
class Projection:
    """One linear map per expert, split into a trainable and a frozen bank.

    Attributes:
        trainable: weights of the n selected experts, `[n, out, in]`, in any float dtype (fp32 by
            choice: small updates vanish in bf16). The only tensor that receives a gradient.
        frozen: weights of the others, `[E - n, out, in]`; never copied. Where they are quantised,
            they are dequantised some experts at a time, and never kept.
        transposed: whether weights are stored `[.., in, out]` instead of `[.., out, in]`.
        trainable_bias: `[n, out]` or None.
        frozen_bias: `[E - n, out]` or None.
    """

    trainable: Tensor
    frozen: Tensor | Quantised
    transposed: bool = False
    trainable_bias: Tensor | None = None
    frozen_bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """Width of what goes in."""
        return self.frozen.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        """Width of what comes out."""
        return self.frozen.shape[-1 if self.transposed else -2]

    def matrices(self) -> Matrices:
        """Cast the trainable bank to the frozen one's dtype; the frozen bank is never copied."""
        dtype = self.frozen.dtype
        trainable = self.trainable.detach().to(dtype)
        frozen: Tensor | StoredMatrices
        if isinstance(self.frozen, Quantised):
            frozen = StoredMatrices(self.frozen, flipped=False)
        else:
            frozen = self.frozen.detach()
        if not self.transposed:
            trainable, frozen = trainable.transpose(-2, -1), frozen.transpose(-2, -1)
        biases = (self.trainable_bias, self.frozen_bias)
        return Matrices(
            trainable,
            frozen,
            *(None if bias is None else bias.detach().to(dtype).contiguous() for bias in biases),
        )


@dataclass(frozen=True)
class ExpertBank:
    """A layer's experts: two projections, the activation between them, and the slot of each.

    Attributes:
        up: hidden to inner; with a gate its output holds both halves, `[N, 2I]`, else `[N, I]`.
        down: inner to hidden.
        slot: `[E]` int64; `slot[e]` is expert e's place once the n trainable ones come first:
            below n it is a row of the trainable bank, else `slot[e] - n` one of the frozen bank.
            Two ids may share a slot, and a slot may have no id.
        activation: maps the up projection's output `[N, 2I]` to `[N, I]`, row by row and free of
            parameters; the backward differentiates it by autograd. With a `SwiGLU` the GPU
            kernels compute it themselves.
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
        """How many expert ids there are: E."""
        return self.slot.shape[0]

    @property
    def num_slots(self) -> int:
        """How many experts both banks have together: S; E where each id has a slot of its own."""
        return self.num_selected + self.up.frozen.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What everything is computed in: the frozen bank's dtype."""
        return self.up.frozen.dtype


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

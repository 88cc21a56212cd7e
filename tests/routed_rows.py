"""Routings and operands for tests of single kernels. No size is a multiple of a tile's."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from esft_kernels.bank import Matrices, slot_map
from esft_kernels.route.naive import route
from esft_kernels.rows import Rows
from guarded_memory import GuardedMemory
from torch import Tensor

E, H, I = 5, 17, 19  # noqa: E741
BLOCK_M = 16
SELECTED = {0: [], 1: [3], 2: [3, 4], 5: [2, 0, 4, 1, 3]}
"""By their number. Of experts 0 and 3, which have no rows in most routings, one is frozen."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TRITON = {"BN": 16, "BK": 16}
"""Tile sizes that are smaller than every operand."""


def topk_index(name: str) -> Tensor:
    """Return a routing `[T, K]` by its name, one of `ROUTINGS`."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(23, E, generator=generator)
    scores[:, [0, 3]] = -1  # never among the best two
    best = scores.topk(2).indices
    if name == "elsewhere":
        best[::3, 0], best[1::4, 1] = -1, E
    if name == "no expert":
        best[2, 1], best[5, 0], best[7, 1], best[11, 0] = -2, E + 1, -(2**40), 2**40
        best[9, 1] = -1
    others = {
        "one expert": torch.full((37, 1), 4),
        "all experts": scores[:7].argsort(),
        "one token": torch.tensor([[2]]),
        "all elsewhere": torch.tensor([[-1, E], [E, -1], [-1, -1]]),
    }
    return others.get(name, best)


ROUTINGS = (
    "uneven",
    "elsewhere",
    "no expert",
    "one expert",
    "all experts",
    "one token",
    "all elsewhere",
)


def routed(name: str, num_selected: int, memory: GuardedMemory) -> Rows:
    """Return the sorted rows of a routing, between guards."""
    rows = route(topk_index(name), slot_map(SELECTED[num_selected], E), BLOCK_M)
    tensors = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(
        rows,
        **{key: memory.fence(value) for key, value in tensors.items() if key != "block_m"},
    )


def random(*shape: int, dtype: torch.dtype, memory: GuardedMemory, seed: int = 5) -> Tensor:
    """Draw a tensor between guards."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    return memory.fence(numbers.to(dtype))


def matrices(
    num_selected: int,
    rows: int,
    columns: int,
    *,
    dtype: torch.dtype,
    memory: GuardedMemory,
    layout: str = "out in",
    bias: bool = False,
) -> Matrices:
    """Draw both banks of a projection, `[.., rows, columns]`.

    `layout` is "in out", "out in" (a linear layer's, the default) or "gaps": neither dimension is
    dense, and the banks differ in the distance from expert to expert.
    """
    generator = torch.Generator().manual_seed(6)

    def bank(experts: int, step: int) -> Tensor:
        if layout == "out in":
            size = (experts, columns, rows)
        elif layout == "in out":
            size = (experts, rows, columns)
        else:
            size = (experts * step, rows, columns, 3)
        numbers = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        if layout == "out in":
            return memory.fence(numbers / rows**0.5).transpose(1, 2)
        if layout == "in out":
            return memory.fence(numbers / rows**0.5)
        return memory.fence((numbers / rows**0.5)[::step, ..., 1])

    def shift(experts: int) -> Tensor | None:
        numbers = torch.randn(experts, columns, generator=generator, dtype=torch.float64)
        return memory.fence(numbers.to(dtype)) if bias else None

    sizes = num_selected, E - num_selected
    return Matrices(bank(sizes[0], 2), bank(sizes[1], 1), shift(sizes[0]), shift(sizes[1]))


def double(banks: Matrices) -> Matrices:
    """Return the same numbers in float64."""

    def convert(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return Matrices(
        banks.trainable.double(),
        banks.frozen.double(),
        convert(banks.trainable_bias),
        convert(banks.frozen_bias),
    )

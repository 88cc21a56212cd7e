"""Memory that shows what a kernel does wrong: reads of nothing, writes outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 4096
"""Elements before and after each tensor: more than a tile of the tests reaches."""
POISON = -77
"""In whole numbers; floats hold NaN."""
_ALLOCATE = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}
_WHOLE = (torch.int32, torch.int64)


class GuardedMemory(TorchDispatchMode):
    """While it is on, `torch.empty` and its kin return poison, between two guards of poison.

    An element that nobody writes, and one that is read from outside, is then NaN in a result; a
    write outside changes a guard, which `check` sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator; put a guarded tensor in the place of a fresh one."""
        out = func(*args, **(kwargs or {}))
        if func not in _ALLOCATE or out.numel() == 0:
            return out
        if not (out.is_floating_point() or out.dtype in _WHOLE):
            return out
        extent = 1 + sum(
            (size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True)
        )
        memory = out.new_full((extent + 2 * GUARD,), _poison(out))
        self._lent.append((memory, extent))
        return memory.as_strided(out.shape, out.stride(), GUARD)

    def fence(self, tensor: Tensor) -> Tensor:
        """Return a copy between guards, with the same strides; a leaf, as the tensor was."""
        # Not `empty_like`, which closes the gaps of a strided view.
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    def lent(self) -> list[Tensor]:
        """Return every tensor that was allocated so far, flattened."""
        return [memory[GUARD : GUARD + extent] for memory, extent in self._lent]

    def check(self) -> None:
        """Fail where a guard is no longer what it was."""
        for memory, extent in self._lent:
            for guard in (memory[:GUARD], memory[GUARD + extent :]):
                assert is_poison(guard).all(), f"written outside a tensor of {extent} elements"


def is_poison(tensor: Tensor) -> Tensor:
    """Say of each element whether it was left as `GuardedMemory` made it."""
    return tensor.isnan() if tensor.is_floating_point() else tensor == POISON


def _poison(tensor: Tensor) -> float:
    return float("nan") if tensor.is_floating_point() else POISON

"""How much of what trains has moved: in the precision it trains in, and as the base stores it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esft.delta import Delta
from esft.errors import EsftError
from esft.moe import trainable_parameters
from esft.shards import Checkpoint, read_blocks
from esft.tensors import TORCH


@dataclass(frozen=True)
class Moved:
    """How many of some numbers training changed.

    Attributes:
        changed: how many are others than before.
        total: how many there are.
    """

    changed: int
    total: int

    @property
    def share(self) -> float:
        """The changed ones among all, 0 to 1."""
        return self.changed / self.total

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"share": self.share}


class StartingPoint:
    """What a model's trainable parameters are before training, in host memory.

    Experts that were loaded from bf16 and train in fp32 take two bytes a parameter here.

    Args:
        model: ready to train; its parameters are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values = {
            name: _compact(parameter.detach())
            for name, parameter in trainable_parameters(model).items()
        }

    def moved(self, model: nn.Module) -> Moved:
        """Count the elements that are not what they were.

        Args:
            model: the same, trained.
        """
        changed = total = 0
        for name, parameter in trainable_parameters(model).items():
            before = self._values[name].to(parameter.device, parameter.dtype)
            changed += int((parameter.detach() != before).sum())
            total += parameter.numel()
        return Moved(changed, total)


def stored_moved(delta: Delta, base: Checkpoint) -> Moved | None:
    """Count the numbers of a delta that are not the base's, bit for bit, as both store them.

    Where this is much less than what moved while training, the base's precision is too coarse for
    the updates.

    Args:
        delta: coded or not.
        base: what it was made from; read tensor by tensor.

    Returns:
        None for a LoRA adapter, which has no tensor of the base, and if the base has gone.
    """
    if delta.is_adapter:
        return None
    changed = total = 0
    try:
        with delta.plain(base) as plain:
            for name, entry in plain.entries.items():
                unsigned = f"<u{TORCH[entry.dtype].itemsize}"
                new = np.frombuffer(b"".join(read_blocks(entry)), unsigned)
                old = np.frombuffer(b"".join(plain.base_blocks(name, base.entries[name])), unsigned)
                changed += int((new != old).sum())
                total += len(new)
    except (OSError, EsftError):
        return None
    return Moved(changed, total)


def _compact(value: Tensor) -> Tensor:
    """Copy a tensor to host memory, in bf16 if it is the same there."""
    rounded = value.to(torch.bfloat16)
    fits = bool((rounded.to(value.dtype) == value).all())
    return (rounded if fits else value).to("cpu", copy=True)

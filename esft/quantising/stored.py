"""A quantised weight as a part of a model: buffers that follow it to another device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from esft_kernels.quantised import Quantised
from torch import Tensor, nn

from esft.errors import ModelError


def stored_weights(model: nn.Module) -> dict[str, StoredWeight]:
    """Return what a model keeps in few bits, by path; tied weights once."""
    by_place = {
        module.value.codes.data_ptr() or id(module): (path, module)
        for path, module in model.named_modules()
        if isinstance(module, StoredWeight)
    }
    return dict(by_place.values())


class StoredWeight(nn.Module):
    """Holds a `Quantised`, so that `model.to(...)` finds its tensors.

    Another dtype is only what is computed in: the stored bits stay. They are not in a state dict,
    and asking for one is an error: whoever saved it would save a rounded model, without a word.

    Args:
        value: the weight.
    """

    def __init__(self, value: Quantised) -> None:
        super().__init__()
        self._outline = value.to("meta")
        for name, tensor in value.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def value(self) -> Quantised:
        """The weight, wherever it is now; its tensors are not copied."""
        buffers: dict[str, Any] = dict(self.named_buffers())
        return replace(self._outline, **buffers)

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.value.nbytes

    @property
    def whole_nbytes(self) -> int:
        """What it would take as loaded."""
        return self.shape.numel() * self._outline.dtype.itemsize

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self._outline.shape

    def extra_repr(self) -> str:
        """Say what it is, in a printed model."""
        return f"{list(self.shape)}, {self._outline.kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        own = self.value
        moved = fn(torch.empty(0, dtype=own.dtype, device=own.device))
        self._outline = replace(self._outline, dtype=moved.dtype)
        for name, tensor in own.to(moved.device).tensors().items():
            self._buffers[name] = tensor
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ModelError(
            f"{prefix.rstrip('.')}: kept in {self._outline.kind} (frozen_dtype), so this model's "
            f"weights cannot be saved or put back whole; save what trained as a delta, and merge "
            f"that into the base"
        )

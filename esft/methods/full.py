"""Full fine-tuning: train everything, save everything that the base has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.delta import Changed, write_delta
from esft.fingerprint import Fingerprint
from esft.methods.base import Method
from esft.names import disk_tensors

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class FullMethod(Method):
    """Train every parameter."""

    name = "full"

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Let every parameter train, in the dtype that it was loaded in."""
        return model.requires_grad_(True)

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write every tensor that the base stores; tied copies are not among them."""
        changes = [Changed(name, tensor) for name, tensor in disk_tensors(model) if name in base]
        write_delta(folder, base, changes, about)

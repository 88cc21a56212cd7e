"""Full fine-tuning: train everything, save everything that the base has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.changes import Changed, check_changes, whole_changes
from esft.delta import write_delta
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

    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Look up each tensor in the base."""
        check_changes(_changes(model, base), base)

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write every tensor that the base stores; tied copies are not among them."""
        write_delta(folder, base, _changes(model, base), about)


def _changes(model: nn.Module, base: Fingerprint) -> list[Changed]:
    return whole_changes(dict(disk_tensors(model)), base)

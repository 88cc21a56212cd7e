"""ESFT: train the selected experts; also its control, in which chance selects them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.changes import check_changes, expert_changes
from esft.delta import write_delta
from esft.experts import attach
from esft.fingerprint import Fingerprint
from esft.loading import DTYPES
from esft.methods.base import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from esft.selection import Selection


class ExpertMethod(Method):
    """Train the experts of a selection and nothing else (arXiv 2407.01906).

    Args:
        selection: which experts.
        name: `esft`, or `random` for a selection drawn by chance.
        param_dtype: of the trainable experts, `float32` or `bfloat16`.
    """

    def __init__(
        self, selection: Selection, *, name: str = "esft", param_dtype: str = "float32"
    ) -> None:
        self.name = name
        self.selection = selection
        self.param_dtype = DTYPES[param_dtype]

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Attach the selection. See `esft.experts.attach`."""
        return attach(model, self.selection, param_dtype=self.param_dtype)

    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Look up each selected expert's tensors in the base."""
        check_changes(expert_changes(model, base), base)

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write the selected experts' weights."""
        write_delta(folder, base, expert_changes(model, base), about)

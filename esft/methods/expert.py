"""ESFT: train selected experts, and what is asked for beside them; also with experts by chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.changes import check_changes, trained_changes
from esft.delta import write_delta
from esft.experts import attach
from esft.fingerprint import Fingerprint
from esft.loading import DTYPES
from esft.methods.base import Method
from esft.progress import SILENT, Reporter
from esft.trained_parts import TrainedParts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from esft.recipe_sections import TrainSpec
    from esft.selection import Selection


class ExpertMethod(Method):
    """Train the experts of a selection, and the parts that the recipe turns on (arXiv 2407.01906).

    Args:
        selection: which experts; None trains none.
        spec: what else trains.
        name: `esft`, or `random` for a selection drawn by chance.
        param_dtype: of what trains, `float32` or `bfloat16`.
        reporter: told of a part that the model lacks.
    """

    def __init__(
        self,
        selection: Selection | None,
        spec: TrainSpec | None = None,
        *,
        name: str = "esft",
        param_dtype: str = "float32",
        reporter: Reporter = SILENT,
    ) -> None:
        self.name = name
        self.selection = selection
        self.parts = {} if spec is None else spec.parts
        self.param_dtype = DTYPES[param_dtype]
        self.reporter = reporter

    @property
    def trained_parts(self) -> TrainedParts:
        """See `Method.trained_parts`."""
        return TrainedParts.of(self.selection, **self.parts)

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Attach the selection. See `esft.experts.attach`."""
        return attach(
            model,
            self.selection,
            **self.parts,
            param_dtype=self.param_dtype,
            reporter=self.reporter,
        )

    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Look up in the base each tensor that trains."""
        check_changes(trained_changes(model, base), base)

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write what trained: the selected experts, and the parts beside them."""
        write_delta(folder, base, trained_changes(model, base), about)

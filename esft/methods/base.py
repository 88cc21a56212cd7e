"""The contract that every training method keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.fingerprint import Fingerprint

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Method(ABC):
    """How a run trains a model, and what it saves.

    Loading and merging need no method: a delta says what it is (`esft.delta.attach_delta`,
    `esft.merging.merge`).

    Attributes:
        name: as in a recipe.
    """

    name: str

    @property
    def adapter(self) -> dict[str, int] | None:
        """What is to be told of an adapter, once prepared, see `esft.run.result.RunResult`."""
        return None

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make the model train what the method trains; may wrap it. Draws from torch's RNG."""

    @abstractmethod
    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Check that what trains can be saved; called before training.

        Raises:
            DeltaError: a tensor has no place in the base, or the base's is quantised.
        """

    @abstractmethod
    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write the delta into an existing empty folder.

        Args:
            model: what `prepare` returned, trained.
            folder: where to; `files.new_folder` makes it appear complete or not at all.
            base: fingerprint of the checkpoint that training started from.
            about: what the manifest says of the run, see `esft.delta.write_delta`.

        Raises:
            DeltaError: the trained weights do not fit the base, or are not finite.
            OutputError: the disk is full or read-only.
        """

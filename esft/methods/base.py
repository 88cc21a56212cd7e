"""The contract that every training method keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.delta import attach_delta
from esft.errors import DeltaError
from esft.fingerprint import Fingerprint
from esft.manifest import read_manifest
from esft.merging import merge
from esft.moe import trainable_parameters
from esft.trained_parts import TrainedParts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Method(ABC):
    """How a run trains a model, what it saves, and how that comes back.

    In the order of their use: `prepare` a model that was loaded from its base, `check` that what
    trains can be saved, train `parameters`, `save` them as a delta, and `load` that delta into
    another model loaded from the same base, or `merge` it into the base's files.

    A delta says by itself how it is read: `esft.delta.attach_delta` and `esft.merging.merge` take
    one of any method, and do what `load` and `merge` do here.

    Attributes:
        name: as in a recipe, and in a delta's manifest.
    """

    name: str

    @property
    def adapter(self) -> dict[str, int] | None:
        """What is to be told of an adapter, once prepared, see `esft.run.result.RunResult`."""
        return None

    @property
    def trained_parts(self) -> TrainedParts:
        """What trains beside routed experts, where it is their parts that the method trains."""
        return TrainedParts()

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make the model train what the method trains; may wrap it. Draws from torch's RNG."""

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return what trains in a prepared model, by name: exactly what will have a gradient."""
        return trainable_parameters(model)

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

    def load(self, model: PreTrainedModel, base: Path, folder: Path) -> PreTrainedModel:
        """Put what `save` wrote into a model, in place; it is an ordinary model afterwards.

        Args:
            model: loaded from the base, nothing attached.
            base: the base's folder.
            folder: the delta's.

        Raises:
            DeltaError: the delta is damaged, or was trained by another method.
            CheckError: it was made from another base.
        """
        self._check_method(folder)
        return attach_delta(model, base, folder)

    def merge(self, base: str | Path, folder: Path, out: Path) -> Path:
        """Write the checkpoint that a delta makes of its base, see `esft.merging.merge`.

        Raises:
            DeltaError: as `load`.
            CheckError: as `load`.
            OutputError: `out` exists, or the disk is full.
        """
        self._check_method(folder)
        return merge(base, folder, out)

    def _check_method(self, folder: Path) -> None:
        found = read_manifest(folder)[0]["method"]
        if found != self.name:
            raise DeltaError(f"{folder}: was trained by the method {found}, not {self.name}")

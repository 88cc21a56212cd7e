"""What each tensor of a model is made of on disk, by transformers' own conversions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from esft.errors import ModelError
from esft.locating import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from esft.shards import Entry


@dataclass
class Origin:
    """What one tensor of a model, or several that are converted together, are made of.

    Attributes:
        target: transformers' name of what comes out: the first of the tensors.
        transform: the conversion; None where a tensor is only called otherwise on disk.
        sources: pattern in the conversion, name on disk.
    """

    target: str
    transform: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def stored(self) -> list[str]:
        """Names on disk of what it is made of."""
        return [key for _, key in self.sources]

    def make(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Convert what is stored: name in the model -> tensor.

        Args:
            model: the conversion looks up shapes and the configuration.
            read: gives a tensor by its name on disk, in the dtype of what comes out.

        Raises:
            ModelError: what is stored cannot be converted.
        """
        if self.transform is None:
            return {self.target: read(self.stored[-1])}
        transform = deepcopy(self.transform)  # it collects tensors
        for pattern, key in self.sources:
            transform.add_tensor(self.target, key, pattern, read(key))
        try:
            made = transform.convert(self.target, model=model, config=model.config)
        except (ValueError, RuntimeError, IndexError) as error:
            raise misfit(self.target, first_line(error)) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def trace(
    model: PreTrainedModel, entries: Mapping[str, Entry], own: Iterable[str]
) -> dict[str, Origin]:
    """Find out, as `from_pretrained` does, what each tensor of a model is made of.

    Leaves the conversions that were used with the model, as `from_pretrained` does.

    Args:
        model: on whatever device.
        entries: of the checkpoint; what the model has no use for is passed over.
        own: names of the model's tensors.

    Raises:
        ModelError: as `Origin.make`.
    """
    known = dict.fromkeys(own, True)  # transformers asks for a mapping without None
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    origins: dict[str, Origin] = {}
    for key in sorted(entries, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:
            target, pattern = rename_source_key(key, [], [], prefix, known)
        if target not in known:
            continue  # of a head or a layer that the family's code leaves out
        transform = deepcopy(of_pattern[pattern]) if pattern is not None else None
        origin = origins.setdefault(target, Origin(target, transform))
        origin.sources.append((pattern or key, key))
    model._weight_conversions = [c for c in conversions if c.was_used()]
    found: dict[str, Origin] = {}
    for origin in origins.values():
        names = [origin.target]
        if origin.transform is not None and len(origin.transform.target_patterns) > 1:
            names = list(
                origin.make(model, lambda key: torch.empty(entries[key].shape, device="meta"))
            )
        found |= dict.fromkeys((name for name in names if name in known), origin)
    return found


def misfit(name: str, reason: str) -> ModelError:
    """Return what is to be raised where stored tensors do not make one of the model's."""
    return ModelError(
        f"tensor {name}: what is stored is not what config.json asks for: {reason}; the checkpoint "
        f"is damaged or of another architecture"
    )

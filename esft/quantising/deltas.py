"""A delta and a model whose frozen weights are in few bits: what goes together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from esft.errors import DeltaError
from esft.quantising.stored import stored_weights

if TYPE_CHECKING:
    from esft.delta import Delta

LOADED_SO = "esft_frozen_dtype"
"""Of a model that was loaded with frozen weights in few bits: `int8` or `nf4` by part."""


def trained_over(delta: Delta) -> dict[str, str]:
    """Return how the frozen weights were kept that a delta was trained over, by part; {} as loaded.

    A merge does not ask: it puts what trained into the base as it is.
    """
    training: Any = delta.manifest.get("training")
    found = training.get("frozen_dtype") if isinstance(training, dict) else None
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def refuse_few_bits(model: nn.Module, delta: Delta) -> None:
    """Refuse to load a delta into a model whose own weights are rounded.

    Raises:
        DeltaError: they are; says over which weights the delta was trained.
    """
    kinds: Mapping[str, str] = getattr(model, LOADED_SO, {})
    if not kinds and not stored_weights(model):
        return
    then = trained_over(delta)
    raise DeltaError(
        f"{delta.folder}: was trained over frozen weights {_named(then)}, and this model keeps "
        f"them {_named(kinds) if kinds else 'in few bits'}: a delta is loaded into the base as it "
        f"is; load the model without frozen_dtype, or merge the delta"
    )


def _named(kinds: Mapping[str, str]) -> str:
    parts = ", ".join(f"{part} in {kind}" for part, kind in kinds.items())
    return f"with {parts}" if parts else "as the base has them"

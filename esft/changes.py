"""What training changed, as tensors of the base checkpoint, still in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esft.errors import DeltaError
from esft.experts import attached_layers
from esft.fingerprint import Fingerprint
from esft.names import layer_parts
from esft.tensors import TORCH

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Changed:
    """One changed tensor of the base.

    Attributes:
        name: its name in the base checkpoint.
        value: the new weights; the whole tensor, or the changed rows where `rows` is given.
        rows: which rows of the base's tensor `value` holds, where experts are fused on disk.
    """

    name: str
    value: Tensor
    rows: tuple[int, ...] | None = None


def expert_changes(model: PreTrainedModel, base: Fingerprint | None = None) -> list[Changed]:
    """Collect the trained experts of a model that has a selection attached, in their own dtype.

    Args:
        model: the model.
        base: of the checkpoint that it was loaded from, see `esft.names.layer_parts`.

    Raises:
        ModelError: no selection is attached, or the checkpoint's layout cannot be addressed.
    """
    changes = []
    for attached in attached_layers(model):
        selected = attached.banks.selected
        if not selected:
            continue
        for name, found in layer_parts(model, attached.layer, base).items():
            values = attached.banks.trained(name).detach()
            for part in found:
                pieces = [part.read(value) for value in values]
                if part.fused:
                    rows = part.rows(selected)
                    changes.append(Changed(part.names[0], part.join(pieces), rows))
                else:
                    changes += [
                        Changed(part.name(expert), piece)
                        for expert, piece in zip(selected, pieces, strict=True)
                    ]
    return changes


def check_changes(changes: Iterable[Changed], base: Fingerprint) -> None:
    """Check that changes can be written as a delta of a base: before training, not after it.

    Raises:
        DeltaError: the base has no such tensor, or it is of another shape or quantised.
    """
    for change in changes:
        _base_dtype(change, base)


def in_base_dtype(change: Changed, base: Fingerprint) -> Tensor:
    """Return a change's value as the base would store it: contiguous, on the CPU.

    Raises:
        DeltaError: as `check_changes`, or it is not finite.
    """
    value = change.value.to(_base_dtype(change, base)).cpu().contiguous()
    if not torch.isfinite(value).all():
        raise DeltaError(f"tensor {change.name} has NaN or infinite values; training diverged")
    return value


def _base_dtype(change: Changed, base: Fingerprint) -> torch.dtype:
    stored = base.get(change.name)
    if stored is None:
        raise DeltaError(f"tensor {change.name} was trained but is not in the base")
    if stored["dtype"] not in TORCH:
        raise DeltaError(
            f"tensor {change.name} is stored as {stored['dtype']} in the base; a delta for "
            f"quantised weights cannot be written"
        )
    shape = list(stored["shape"])
    if change.rows is not None:
        shape[0] = len(change.rows)
    if list(change.value.shape) != shape:
        raise DeltaError(
            f"tensor {change.name} has shape {list(change.value.shape)}, "
            f"{shape} is expected in the base"
        )
    return TORCH[stored["dtype"]]

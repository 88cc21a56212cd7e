"""What training changed, as tensors of the base checkpoint, still in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esft.errors import CheckError, DeltaError
from esft.experts import attached_layers, is_shared, part_buffers, part_parameters
from esft.fingerprint import Fingerprint
from esft.held import whole
from esft.moe import moe_layers
from esft.names import layer_parts, to_disk
from esft.processes import is_main
from esft.shards import Checkpoint
from esft.tensors import TORCH, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.selection import Selection


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

    Where processes share the model, all must call this, and the main one alone gets them.

    Args:
        model: the model.
        base: of the checkpoint that it was loaded from, see `esft.names.layer_parts`.

    Raises:
        ModelError: no selection is attached, or the checkpoint's layout cannot be addressed.
    """
    changes = []
    for attached in attached_layers(model):
        selected = attached.banks.everywhere
        if not selected:
            continue
        for name, found in layer_parts(model, attached.layer, base).items():
            values = attached.banks.collected(name)
            if values is None:
                continue
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


def selection_bytes(model: PreTrainedModel, selection: Selection, base: Fingerprint) -> int:
    """Return the bytes of the tensors that a delta of a selection's experts would have.

    Args:
        model: nothing is attached.
        selection: which experts; it fits the model.
        base: of the checkpoint that the model was loaded from.

    Raises:
        ModelError: the checkpoint's layout cannot be addressed.
        DeltaError: the base's experts are quantised.
    """
    total = 0
    for layer in moe_layers(model):
        selected = selection.experts.get(layer.index, [])
        for found in layer_parts(model, layer, base).values() if selected else ():
            for part in found:
                for expert in selected:
                    total += part.numbers.numel() * _stored_dtype(part.name(expert), base).itemsize
    return total


def trained_changes(model: PreTrainedModel, base: Fingerprint) -> list[Changed]:
    """Collect all that trains in a model that has a selection attached, in its own dtype.

    The selected experts; every parameter of the parts that train beside them, whether it moved or
    not; and of the routers, where they train, the buffers that the base stores. Where processes
    share the model, all must call this, and the main one alone gets the changes.

    Args:
        model: the model.
        base: of the checkpoint that it was loaded from.

    Raises:
        ModelError: no selection is attached, or the checkpoint's layout cannot be addressed.
    """
    experts = expert_changes(model, base)
    parts = whole(part_parameters(model))
    if is_shared(model) and not is_main():
        return []
    parameters = {name: parameter.detach() for name, parameter in parts.items()}
    buffers = to_disk(model, part_buffers(model))
    return [
        *experts,
        *whole_changes(to_disk(model, parameters), base),
        *(Changed(name, buffer) for name, buffer in buffers.items() if name in base),
    ]


def whole_changes(tensors: Mapping[str, Tensor], base: Fingerprint) -> list[Changed]:
    """Return changes of whole tensors, of tied ones the one that the base stores.

    Args:
        tensors: by their names on disk, of tied ones all.
        base: the checkpoint's; a tensor that is not tied to one in it is left in, to be refused.
    """
    stored = {tensor.data_ptr() for name, tensor in tensors.items() if name in base}
    return [
        Changed(name, tensor)
        for name, tensor in tensors.items()
        if name in base or tensor.data_ptr() not in stored
    ]


def check_changes(changes: Iterable[Changed], base: Fingerprint) -> None:
    """Check that changes can be written as a delta of a base: before training, not after it.

    Raises:
        DeltaError: the base has no such tensor, or it is of another shape or quantised.
    """
    for change in changes:
        _base_dtype(change, base)


def check_start(changes: Iterable[Changed], base: Checkpoint) -> None:
    """Check that weights about to train are those of their base, as far as its loading kept them.

    Args:
        changes: what training will change; `check_changes` has passed it.
        base: the checkpoint that the model should have been loaded from.

    Raises:
        CheckError: a tensor has other values there.
    """
    for change in changes:
        stored = read_tensor(base.entries[change.name], change.rows)
        value = change.value.cpu()
        # A model may have been loaded in a narrower dtype than its checkpoint's.
        if not torch.allclose(value.double(), stored.double(), rtol=2**-8, atol=2**-24):
            raise CheckError(
                f"{base.folder}: the model was not loaded from this base: tensor {change.name} "
                f"has other values in memory"
            )


def in_base_dtype(change: Changed, base: Fingerprint) -> Tensor:
    """Return a change's value as the base would store it: contiguous, on the CPU.

    Raises:
        DeltaError: as `check_changes`, or it is not finite.
    """
    value = change.value.to(_base_dtype(change, base)).cpu().contiguous()
    if not torch.isfinite(value).all():
        raise DeltaError(f"tensor {change.name} has NaN or infinite values; training diverged")
    return value


def _stored_dtype(name: str, base: Fingerprint) -> torch.dtype:
    stored = base.get(name)
    if stored is None:
        raise DeltaError(f"tensor {name} was trained but is not in the base")
    if stored["dtype"] not in TORCH:
        raise DeltaError(
            f"tensor {name} is stored as {stored['dtype']} in the base; a delta for quantised "
            f"weights cannot be written"
        )
    return TORCH[stored["dtype"]]


def _base_dtype(change: Changed, base: Fingerprint) -> torch.dtype:
    dtype = _stored_dtype(change.name, base)
    shape = list(base[change.name]["shape"])
    if change.rows is not None:
        shape[0] = len(change.rows)
    if list(change.value.shape) != shape:
        raise DeltaError(
            f"tensor {change.name} has shape {list(change.value.shape)}, "
            f"{shape} is expected in the base"
        )
    return dtype

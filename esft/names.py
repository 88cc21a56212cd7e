"""Module path <-> on-disk tensor name: where each expert of a fused stack lives in a checkpoint.

transformers 5 holds a layer's experts in stacks `[E, ...]`, while most checkpoints hold one 2-D
tensor per expert and projection. No table of names is kept here: transformers' own reverse
conversion is run on small integer tensors, and what comes out tells which names an expert has and
which of its numbers each name holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from esft.errors import ModelError
from esft.moe import MoeLayer, moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Part:
    """A tensor on disk that holds all or some numbers of an expert's slice of a stack.

    Attributes:
        names: name of the tensor for each expert, by id; one name for all where they are fused.
        fused: whether the tensor holds all experts, instead of one.
        numbers: positions in the expert's flattened slice; its shape is that of the tensor on
            disk, or of one expert's share of it where fused.
        each: rows of an expert where the tensor is `[E * each, ...]` instead of `[E, ...]`.
        may_turn: whether the tensor on disk may be transposed: transformers turns the stacks of
            some families when it loads them, if their shapes say so (Qwen3-VL-MoE).
    """

    names: tuple[str, ...]
    fused: bool
    numbers: Tensor
    each: int | None = None
    may_turn: bool = False

    def name(self, expert: int) -> str:
        """Return the name of the tensor that holds this expert."""
        return self.names[0] if self.fused else self.names[expert]

    def rows(self, experts: Sequence[int]) -> tuple[int, ...]:
        """Return the rows of a fused tensor that hold these experts, in their order."""
        each = self.each or 1
        return tuple(row for expert in experts for row in range(expert * each, (expert + 1) * each))

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Put together what `read` returned for some experts: their `rows` of a fused tensor."""
        return torch.stack(list(pieces)) if self.each is None else torch.cat(list(pieces))

    def cut(self, tensor: Tensor, row: int) -> Tensor:
        """Return the share of the expert whose first row is `row` of a fused tensor."""
        return tensor[row] if self.each is None else tensor[row : row + self.each]

    def turned(self, shape: Sequence[int]) -> Part:
        """Return this part as it is in a tensor on disk in which an expert has this shape."""
        if not self.may_turn or tuple(shape) == self.numbers.shape:
            return self
        return replace(self, numbers=self.numbers.transpose(-2, -1))

    def read(self, expert_slice: Tensor) -> Tensor:
        """Cut this part out of an expert's slice `[...]` of the stack."""
        return expert_slice.reshape(-1)[self.numbers.to(expert_slice.device)]

    def write(self, expert_slice: Tensor, value: Tensor) -> None:
        """Put this part into an expert's contiguous slice `[...]` of the stack, in place."""
        places = self.turned(value.shape).numbers.reshape(-1).to(expert_slice.device)
        expert_slice.view(-1)[places] = value.reshape(-1).to(expert_slice)


def layer_parts(
    model: PreTrainedModel, layer: MoeLayer, base: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, list[Part]]:
    """Return how a layer's experts are laid out in the checkpoint that the model came from.

    Args:
        model: the model.
        layer: one of its layers.
        base: the checkpoint's fingerprint; its shapes say which way round the stacks are, where
            that may differ (`Part.may_turn`). None takes them to be as in the model.

    Returns:
        name of a weight, as in `layer.layout.shapes()` -> the tensors on disk that hold it.

    Raises:
        ModelError: the checkpoint stores experts in a way that cannot be addressed by expert.
    """
    found = {}
    for weight, shape in layer.layout.shapes().items():
        names = layer.layout.tensor_names(weight)
        each = layer.layout.disk_rows()
        if len(names) == 1:
            found[weight] = [
                part.turned(base[part.names[0]]["shape"][1:])
                if base is not None and part.names[0] in base
                else part
                for part in parts(model, names[0], shape, each)
            ]
        else:
            found[weight] = [_part_of_modules(model, names, shape[1:])]
    return found


def parts(
    model: PreTrainedModel, stack: str, shape: torch.Size, each: int | None = None
) -> list[Part]:
    """Return how a stack of experts is laid out in the checkpoint that the model came from.

    Args:
        model: the model; the conversion used at loading is followed, else its family's default.
        stack: the stack's name in the model, `model.layers.1.mlp.experts.gate_up_proj`.
        shape: the stack's shape `[E, ...]`.
        each: rows of an expert where the model itself has the stack as `[E * each, ...]`.

    Raises:
        ModelError: the checkpoint stores experts in a way that cannot be addressed by expert.
    """
    num_experts = shape[0]
    if each is not None:
        (name,) = _on_disk(model, stack, torch.zeros(1, 1))
        return [Part((name,), True, torch.arange(shape[1:].numel()).view(shape[1:]), each)]
    if _may_turn(model, stack):
        (name,) = _on_disk(_Unturned(model, shape), stack, torch.empty(shape, device="meta"))
        return [Part((name,), True, torch.arange(shape[1:].numel()).view(shape[1:]), may_turn=True)]
    owner = torch.arange(num_experts).view(-1, *[1] * (len(shape) - 1))
    # Two rows and columns are enough to be cut in halves; only names and owners are read.
    owners = _on_disk(model, stack, owner.expand(num_experts, *[2] * (len(shape) - 1)))
    numbers = torch.arange(shape[1:].numel()).view(1, *shape[1:])
    found = []
    by_expert: dict[int, list[str]] = {}
    fused = []
    for name, ids in owners.items():
        unique = ids.unique()
        if len(unique) == 1 and num_experts > 1:
            by_expert.setdefault(int(unique), []).append(name)
        elif ids.shape[0] == num_experts and torch.equal(ids, owner.expand_as(ids)):
            fused.append(name)
        else:
            raise ModelError(f"{name}: experts are mixed within this tensor; not supported")
    for name, places in _on_disk(model, stack, numbers).items():
        if name in fused:
            found.append(Part((name,), True, places[0]))
        elif name in by_expert.get(0, []):
            place = by_expert[0].index(name)
            names = tuple(by_expert[expert][place] for expert in range(num_experts))
            found.append(Part(names, False, places))
        else:
            raise ModelError(f"{name}: cannot tell how the experts of {stack} are stored")
    return found


class _Unturned:
    """Stands in for a model whose stack has a certain shape, attached or not, to a conversion."""

    def __init__(self, model: PreTrainedModel, shape: torch.Size) -> None:
        self._model, self._shape = model, shape

    def get_parameter(self, _name: str) -> Tensor:
        return torch.empty(self._shape, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _may_turn(model: PreTrainedModel, stack: str) -> bool:
    """Whether transformers transposes a stack at loading if its shape is not the model's."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return any(
        getattr(operation, "check_dims", False)
        and any(pattern in stack for pattern in conversion.target_patterns)
        for conversion in conversions
        for operation in getattr(conversion, "operations", None) or []
    )


def _part_of_modules(model: PreTrainedModel, names: Sequence[str], shape: torch.Size) -> Part:
    """Lay out a weight of which each expert has a tensor of its own in the model."""
    on_disk = []
    for name in names:
        found = list(_on_disk(model, name, torch.zeros(1, 1)))
        if len(found) != 1:
            raise ModelError(f"{name}: cannot tell how it is stored")
        on_disk += found
    return Part(tuple(on_disk), False, torch.arange(shape.numel()).view(shape))


def disk_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and persistent buffer under its on-disk name, in the model's dtype.

    Tied tensors appear under each of their names.
    """
    yield from to_disk(model, dict(model.state_dict())).items()


def to_disk(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under their on-disk names, as they are laid out there.

    Args:
        model: as for `parts`.
        tensors: by their names in the model; where a checkpoint keeps several in one, all of them.
    """
    return dict(revert_weight_conversion(model, dict(tensors)))


def _on_disk(model: PreTrainedModel | _Unturned, stack: str, value: Tensor) -> dict[str, Tensor]:
    converted = revert_weight_conversion(model, {stack: value})
    return {name: tensor.detach() for name, tensor in converted.items()}


def write_into(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], rows: Mapping[str, Sequence[int]]
) -> None:
    """Write tensors of a checkpoint into a loaded model, in place, cast to its dtype.

    Args:
        model: an ordinary model, no selection attached.
        tensors: on-disk name -> the whole tensor, or the rows listed in `rows`.
        rows: on-disk name -> which experts the tensor's rows are, where experts are fused.

    Raises:
        ModelError: the model has no place for a tensor.
    """
    left = set(tensors)
    own: set[str] = set()
    for layer in moe_layers(model):
        stacks = layer.layout.weights()
        for weight, found in layer_parts(model, layer).items():
            own |= set(layer.layout.tensor_names(weight))
            for part in found:
                left -= _write_part(part, stacks[weight], tensors, rows)
    if left:
        rest = {key: tensor for key, tensor in model.state_dict().items() if key not in own}
        left -= _write_whole(model, rest, {name: tensors[name] for name in left})
    if left:
        raise ModelError(f"tensor {min(left)} has no place in {type(model).__name__}")


def _write_whole(
    model: PreTrainedModel, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> set[str]:
    """Write tensors of a checkpoint into a model's `own`, in place; return their names."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    views = {
        name: place
        for name, place in to_disk(model, own).items()
        if place.untyped_storage().data_ptr() in memory
    }
    for name in views.keys() & tensors.keys():
        views[name].copy_(tensors[name])
    written = views.keys() & tensors.keys()
    # What is laid out otherwise on disk. Each number of it is given one of its own, and the
    # conversion tells where on disk it is.
    seen = {place.untyped_storage().data_ptr() for place in views.values()}
    others = {k: t for k, t in own.items() if t.untyped_storage().data_ptr() not in seen}
    if written == tensors.keys() or not others:
        return written
    numbers, first = {}, 0
    for key, tensor in others.items():
        numbers[key] = torch.arange(first, first + tensor.numel()).view(tensor.shape)
        first += tensor.numel()
    flat = torch.cat([tensor.reshape(-1) for tensor in others.values()])
    for name, places in to_disk(model, numbers).items():
        if name in tensors:
            flat[places.to(flat.device)] = tensors[name].to(flat)
            written = written | {name}
    pieces = flat.split([tensor.numel() for tensor in others.values()])
    for tensor, piece in zip(others.values(), pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))
    return written


def _write_part(
    part: Part,
    experts: Sequence[Tensor],
    tensors: Mapping[str, Tensor],
    rows: Mapping[str, Sequence[int]],
) -> set[str]:
    """Write what tensors hold of a part into the experts' slices; return their names."""
    if not part.fused:
        found = dict(zip(part.names, experts, strict=True))
        for name in found.keys() & tensors.keys():
            part.write(found[name], tensors[name])
        return found.keys() & tensors.keys()
    name = part.names[0]
    if name not in tensors:
        return set()
    order = rows.get(name, part.rows(range(len(experts))))
    place = {row: number for number, row in enumerate(order)}
    for expert, slice_ in enumerate(experts):
        first = part.rows([expert])[0]
        if first in place:
            part.write(slice_, part.cut(tensors[name], place[first]))
    return {name}

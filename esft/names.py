"""Module path <-> on-disk tensor name: where each expert of a fused stack lives in a checkpoint.

transformers 5 holds a layer's experts in stacks `[E, ...]`, while most checkpoints hold one 2-D
tensor per expert and projection. No table of names is kept here: transformers' own reverse
conversion is run on small integer tensors, and what comes out tells which names an expert has and
which of its numbers each name holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from esft.errors import ModelError
from esft.moe import moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Part:
    """A tensor on disk that holds all or some numbers of an expert's slice of a stack.

    Attributes:
        names: name of the tensor for each expert, by id; one name for all where they are fused.
        fused: whether the tensor holds all experts, `[E, ...]`, instead of one.
        numbers: positions in the expert's flattened slice; its shape is that of the tensor on
            disk (without the leading E where fused).
    """

    names: tuple[str, ...]
    fused: bool
    numbers: Tensor

    def name(self, expert: int) -> str:
        """Return the name of the tensor that holds this expert."""
        return self.names[0] if self.fused else self.names[expert]

    def read(self, expert_slice: Tensor) -> Tensor:
        """Cut this part out of an expert's slice `[...]` of the stack."""
        return expert_slice.reshape(-1)[self.numbers.to(expert_slice.device)]

    def write(self, expert_slice: Tensor, value: Tensor) -> None:
        """Put this part into an expert's contiguous slice `[...]` of the stack, in place."""
        places = self.numbers.reshape(-1).to(expert_slice.device)
        expert_slice.view(-1)[places] = value.reshape(-1).to(expert_slice)


def parts(model: PreTrainedModel, stack: str, shape: torch.Size) -> list[Part]:
    """Return how a stack of experts is laid out in the checkpoint that the model came from.

    Args:
        model: the model; the conversion used at loading is followed, else its family's default.
        stack: the stack's name in the model, `model.layers.1.mlp.experts.gate_up_proj`.
        shape: the stack's shape `[E, ...]`.

    Raises:
        ModelError: the checkpoint stores experts in a way that cannot be addressed by expert.
    """
    num_experts = shape[0]
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


def disk_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and persistent buffer under its on-disk name, in the model's dtype.

    Tied tensors appear under each of their names.
    """
    yield from revert_weight_conversion(model, dict(model.state_dict())).items()


def _on_disk(model: PreTrainedModel, stack: str, value: Tensor) -> dict[str, Tensor]:
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
    stacks: dict[str, Tensor] = {}
    for layer in moe_layers(model):
        for name, parameter in layer.experts.named_parameters(recurse=False):
            stacks[f"{layer.name}.{name}"] = parameter.detach()
    for stack_name, stack in stacks.items():
        for part in parts(model, stack_name, stack.shape):
            for expert in range(stack.shape[0]):
                name = part.name(expert)
                if name not in tensors:
                    continue
                left.discard(name)
                if not part.fused:
                    part.write(stack[expert], tensors[name])
                elif expert in (order := list(rows.get(name, range(stack.shape[0])))):
                    part.write(stack[expert], tensors[name][order.index(expert)])
    if left:
        for key, tensor in model.state_dict().items():
            if key in stacks:
                continue
            # A renaming hands the tensor itself through, so writing to it writes to the model.
            for name, place in _on_disk(model, key, tensor).items():
                if name in left and place.data_ptr() == tensor.data_ptr():
                    place.copy_(tensors[name])
                    left.discard(name)
    if left:
        raise ModelError(f"tensor {min(left)} has no place in {type(model).__name__}")

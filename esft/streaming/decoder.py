"""A model's decoder layers: the places between which its weights can come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from esft.errors import ModelError
from esft.moe import MoeLayer


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of the stack that has the routed experts.

    Attributes:
        index: its place among the model's decoder layers.
        name: its path in the model, `model.layers.3`.
        module: the module at that path.
        moe: what it has of routed experts; a dense layer has none.
    """

    index: int
    name: str
    module: nn.Module
    moe: tuple[MoeLayer, ...]


def decoder_layers(model: nn.Module, moe: Sequence[MoeLayer]) -> tuple[DecoderLayer, ...]:
    """Find the decoder layers of a model, in the order of its list of them.

    Args:
        model: of any family.
        moe: its MoE layers.

    Raises:
        ModelError: the MoE layers do not stand in one list.
    """
    stacks = dict.fromkeys(_stack(layer.name) for layer in moe)
    if len(stacks) != 1:
        raise ModelError(
            f"{type(model).__name__}: its experts are in {len(stacks)} lists of layers "
            f"({', '.join(stacks)}); only models with one can be streamed: give --no-stream"
        )
    (stack,) = stacks
    return tuple(
        DecoderLayer(
            index,
            name := f"{stack}.{key}",
            module,
            tuple(layer for layer in moe if f"{layer.name}.".startswith(f"{name}.")),
        )
        for index, (key, module) in enumerate(model.get_submodule(stack).named_children())
    )


def _stack(name: str) -> str:
    """Return what stands before the first number of a path: the list of layers."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])

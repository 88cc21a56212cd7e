"""A delta on a model whose experts are elsewhere: its experts pinned, the rest put in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from esft.delta import Delta, read_delta
from esft.delta_experts import held_experts, value_of
from esft.errors import DeltaError
from esft.names import layer_parts, write_into
from esft.offload.cache import Place
from esft.offload.weights import Weights
from esft.weight_source import WeightSource


@contextmanager
def opened_delta(source: WeightSource, folder: Path) -> Iterator[Delta]:
    """Open a delta that was made from a checkpoint, with its values as they are.

    Raises:
        DeltaError: it is damaged, or an adapter.
        CheckError: it was made from another base.
    """
    delta = read_delta(folder)
    delta.check_base(source.checkpoint)
    if delta.is_adapter:
        raise DeltaError(
            f"{folder}: a LoRA adapter is added to weights that are all there, which "
            f"--expert-memory does without; merge it into its base first"
        )
    with delta.plain(source.checkpoint) as plain:
        yield plain


def delta_experts(source: WeightSource, delta: Delta) -> dict[Place, Weights]:
    """Return each expert that a delta changes, whole, in the dtype that the model has."""
    shapes = {name: {"shape": e.shape} for name, e in source.checkpoint.entries.items()}
    found: dict[Place, Weights] = {}
    for place, layer in enumerate(source.layers):
        parts = layer_parts(source.model, layer, shapes)
        held = {
            weight: [(part, set(held_experts(part, delta))) for part in own]
            for weight, own in parts.items()
        }
        for expert in sorted(set().union(*(ids for own in held.values() for _, ids in own))):
            slices = source.read_expert(layer, expert)
            for weight, own in held.items():
                for part, ids in own:
                    if expert in ids:
                        part.write(slices[weight], value_of(part, delta, expert))
            found[place, expert] = dict(slices)
    return found


def put_others(source: WeightSource, delta: Delta) -> None:
    """Write what a delta changes beside routed experts into the model, which has it already."""
    experts = {
        name
        for layer in source.layers
        for own in source.places(layer).values()
        for part in own
        for name in part.names
    }
    others: dict[str, Tensor] = {
        name: delta.tensor(name) for name in delta.entries if name not in experts
    }
    write_into(source.model, others, {})

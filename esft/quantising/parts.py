"""Which weights of a model are kept in 8 or 4 bits: frozen ones, of the parts that are asked for.

From names and shapes alone: a model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from esft.errors import ModelError
from esft.trained_parts import ROUTER, TrainedParts, parameter_parts

if TYPE_CHECKING:
    from esft.moe import MoeLayer

EXPERTS, LINEAR, EMBEDDINGS = "experts", "linear", "embeddings"


def stored_kinds(
    model: Any,
    layers: Sequence[MoeLayer],
    kinds: Mapping[str, str],
    trained: TrainedParts,
) -> dict[str, str]:
    """Return how each weight that is quantised is stored: name in the model -> `int8` or `nf4`.

    Of a stack of routed experts `[E, ...]` that says how the experts are stored which are not
    selected. Of tied weights each name is there. Routers, norms, biases, the gates of shared
    experts and all that trains are never among them.

    Args:
        model: an ordinary transformers model, nothing attached.
        layers: its MoE layers.
        kinds: what is asked for, part by part: see `esft.recipe_sections.FrozenSpec`.
        trained: what trains beside the selected experts.

    Raises:
        ModelError: experts are asked for whose family calls them one at a time, by its own code.
    """
    found: dict[str, str] = {}
    if (kind := kinds.get(EXPERTS)) is not None:
        found |= dict.fromkeys(_expert_weights(layers), kind)
    frozen = {
        name
        for name, part in parameter_parts(model, layers).items()
        if part != ROUTER and part not in trained.names
    }
    gates = {f"{path}_gate" for layer in layers for path in layer.shared}
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    owners: dict[nn.Parameter, list[tuple[str, str | None]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            part = _part(module, own, ends) if name in frozen and path not in gates else None
            owners.setdefault(parameter, []).append((name, part))
    for tied in owners.values():
        if all(part in kinds for _, part in tied):
            found |= {name: kinds[part] for name, part in tied if part is not None}
    return found


def _part(module: nn.Module, own: str, ends: set[nn.Module]) -> str | None:
    """Return the part that a module's parameter is of, or None if it is never quantised."""
    # Of classes derived from these, some compute otherwise.
    if own != "weight" or type(module) not in (nn.Linear, nn.Embedding):
        return None
    if module in ends:
        return EMBEDDINGS
    return LINEAR if type(module) is nn.Linear else None


def _expert_weights(layers: Sequence[MoeLayer]) -> Iterator[str]:
    for layer in layers:
        layout = layer.layout
        if not layout.takes_blocks:
            raise ModelError(
                f"{layer.name}: these experts cannot be kept in 8 or 4 bits: their family's own "
                f"code computes with one expert's weights at a time, and keeps them until the "
                f"backward pass; leave experts out of frozen_dtype ({{linear: nf4}})"
            )
        for weight, shape in layout.shapes().items():
            if len(shape) > 2:  # biases are small, and stay
                yield from layout.tensor_names(weight)

"""Attach a selection to a model: each layer's experts split into those that train and the rest.

The selected experts become small parameters of their own, in fp32, and everything else is frozen,
but for the parts of the model that are asked for (see `esft.trained_parts`). How the experts are
split, depends on the family: see `esft.layouts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.banks import TrainedExperts
from esft.errors import ModelError, SelectionError
from esft.held import refuse_unknown_sharing
from esft.masters import add_masters, remove_masters, said_dtypes
from esft.moe import MoeLayer, moe_layers
from esft.progress import SILENT, Reporter
from esft.selection import Selection
from esft.trained_parts import TrainedParts, parameter_parts, router_buffers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NONE = "no selection is attached to this model; call esft.attach(model, selection) first"


@dataclass(frozen=True)
class AttachedLayer:
    """An MoE layer and what is attached to it."""

    layer: MoeLayer
    banks: TrainedExperts


@dataclass(frozen=True)
class _AttachedParts:
    """What was asked to train. Lives at `esft_parts` of the model."""

    selection: Selection | None
    parts: TrainedParts
    masters: RemovableHandle


def attach(
    model: PreTrainedModel,
    selection: Selection | str | Path | None,
    *,
    shared_experts: bool | None = None,
    non_expert_modules: bool | None = None,
    router: bool | None = None,
    param_dtype: torch.dtype | None = torch.float32,
    reporter: Reporter = SILENT,
) -> PreTrainedModel:
    """Make a model train the selected experts, and nothing else but the parts asked for.

    Changes the model in place. Every parameter is frozen; in each MoE layer the selected experts
    move into trainable parameters `[n, ...]`, and what trains of the other parts does so where it
    is, under its own name. Gradients still flow through the frozen experts and the gate values to
    earlier layers.

    Args:
        model: a model with routed experts, with no selection attached yet.
        selection: which experts train, by layer index (see `esft.moe.MoeLayer`), or its file;
            None trains no routed expert.
        shared_experts: whether the shared experts train too; None does what the selection says.
            What belongs to this part and the next two: `esft.trained_parts`.
        non_expert_modules: likewise everything that is neither an expert nor a router.
        router: likewise the routers; a selection that says `non_expert_modules` means them too.
        param_dtype: of the trainable parameters. float32 keeps updates that bf16 would round away.
            What is wider already stays as it is, and the modules compute in their own dtype. None
            leaves every weight in the dtype that it has.
        reporter: told of a part that this model lacks.

    Returns:
        the same model.

    Raises:
        ModelError: the model is dense or not supported, quantised, or has a selection attached
            already.
        SelectionError: the selection names a layer or an expert that the model does not have, or
            nothing is left to train, or its file cannot be read.
    """
    if isinstance(selection, str | Path):
        selection = Selection.read(selection)
    layers = moe_layers(model)
    if any(layer.layout.banks is not None for layer in layers):
        raise ModelError("this model has a selection attached already; detach it first")
    parts = TrainedParts.of(selection, shared_experts, non_expert_modules, router)
    if selection is not None:
        selection.check_against({layer.index: layer.num_experts for layer in layers})
    refuse_unknown_sharing(model)
    for layer in layers:
        layer.layout.refuse_unsupported()
    names = _part_names(model, layers, parts, reporter)
    if selection is None and not names:
        raise SelectionError(
            "nothing would train: no experts are selected, and the model has nothing of the parts "
            f"asked for ({', '.join(parts.names) or 'none'})"
        )
    model.requires_grad_(False)
    said = said_dtypes(model)  # the first parameter may soon be an expert's, in fp32
    experts = {} if selection is None else selection.experts
    for layer in layers:
        layer.layout.attach(experts.get(layer.index, []), param_dtype)
    state: Any = _AttachedParts(
        selection,
        parts,
        add_masters(model, names if param_dtype else [], param_dtype or torch.float32, said),
    )
    model.esft_parts = state
    for parameter in part_parameters(model).values():
        parameter.requires_grad_(True)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Put the trained experts back among the others. Changes the model in place.

    What trained is rounded to the dtype that the model computes in. What comes out is an ordinary
    transformers model, all of its parameters frozen.

    Raises:
        ModelError: no selection is attached.
    """
    for attached in attached_layers(model):
        attached.layer.layout.detach()
    attached_parts: Any = model.esft_parts
    remove_masters(model, attached_parts.masters)
    del model.esft_parts
    model.requires_grad_(False)
    return model


def attached_selection(model: PreTrainedModel) -> Selection | None:
    """Return the selection that is attached to a model, None if no routed expert trains.

    Raises:
        ModelError: nothing is attached.
    """
    attached: Any = getattr(model, "esft_parts", None)
    if attached is None:
        raise ModelError(_NONE)
    found: Selection | None = attached.selection
    return found


def attached_layers(model: nn.Module) -> list[AttachedLayer]:
    """Return the MoE layers with what is attached to them, by ascending index.

    Raises:
        ModelError: no selection is attached.
    """
    found = [
        AttachedLayer(layer, banks)
        for layer in moe_layers(model)
        if (banks := layer.layout.banks) is not None
    ]
    if not found:
        raise ModelError(_NONE)
    return found


def is_shared(model: nn.Module) -> bool:
    """Whether processes share the experts of a model that has a selection attached."""
    return any(getattr(layer.banks, "held", None) is not None for layer in attached_layers(model))


def attached_parts(model: nn.Module) -> TrainedParts:
    """Return the parts that train beside the experts; none where nothing is attached."""
    attached: Any = getattr(model, "esft_parts", None)
    return TrainedParts() if attached is None else attached.parts


def part_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the parts that train beside the experts; tied ones by each name."""
    wanted = attached_parts(model).names
    if not wanted:
        return {}
    parts = parameter_parts(model, moe_layers(model))
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parts.get(name) in wanted
    }


def part_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to what trains: the routers', which a loss may correct."""
    return router_buffers(model, moe_layers(model)) if attached_parts(model).router else {}


def _part_names(
    model: nn.Module, layers: Sequence[MoeLayer], parts: TrainedParts, reporter: Reporter
) -> list[str]:
    """Name the parameters of some parts, and tell of a part that there is nothing of."""
    if not parts.names:
        return []
    found = parameter_parts(model, layers)
    for part in parts.names:
        if part not in found.values():
            reporter.note(f"{part}: this model has none; nothing of them trains")
    names = [name for name, part in found.items() if part in parts.names]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if not parameters[name].is_floating_point():
            raise ModelError(
                f"{name}: {parameters[name].dtype}; quantised weights cannot train; leave out "
                f"{found[name]}"
            )
    return names

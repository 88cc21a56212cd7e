"""Attach a selection to a model: each layer's experts split into those that train and the rest.

The selected experts become small parameters of their own, in fp32, and everything else is frozen.
How, depends on the family: see `esft.layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from esft.banks import TrainedExperts
from esft.errors import ModelError, SelectionError
from esft.moe import MoeLayer, moe_layers
from esft.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NONE = "no selection is attached to this model; call esft.attach(model, selection) first"


@dataclass(frozen=True)
class AttachedLayer:
    """An MoE layer and what is attached to it."""

    layer: MoeLayer
    banks: TrainedExperts


def attach(
    model: PreTrainedModel,
    selection: Selection | str | Path,
    *,
    param_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Make a model train the selected experts and nothing else. Changes the model in place.

    Every parameter is frozen; in each MoE layer the selected experts move into trainable
    parameters `[n, ...]`. Gradients still flow through the frozen experts and the gate values to
    earlier layers.

    Args:
        model: a model with routed experts, with no selection attached yet.
        selection: which experts train, by layer index (see `esft.moe.MoeLayer`), or its file.
        param_dtype: of the trainable parameters. float32 keeps updates that bf16 would round away.

    Returns:
        the same model.

    Raises:
        ModelError: the model is dense or not supported, or has a selection attached already.
        SelectionError: the selection names a layer or an expert that the model does not have, or
            its file cannot be read.
    """
    if isinstance(selection, str | Path):
        selection = Selection.read(selection)
    layers = moe_layers(model)
    if any(layer.layout.banks is not None for layer in layers):
        raise ModelError("this model has a selection attached already; detach it first")
    if selection.shared_experts or selection.non_expert_modules:
        raise SelectionError(
            "shared_experts and non_expert_modules of a selection cannot be trained yet; "
            "set both to false"
        )
    selection.check_against({layer.index: layer.num_experts for layer in layers})
    for layer in layers:
        layer.layout.refuse_unsupported()
    model.requires_grad_(False)
    for layer in layers:
        layer.layout.attach(selection.experts.get(layer.index, []), param_dtype)
    model.esft_selection = selection
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Put the trained experts back among the others. Changes the model in place.

    They are rounded to the dtype of the frozen ones. What comes out is an ordinary transformers
    model, all of its parameters frozen.

    Raises:
        ModelError: no selection is attached.
    """
    for attached in attached_layers(model):
        attached.layer.layout.detach()
    del model.esft_selection
    return model


def attached_selection(model: PreTrainedModel) -> Selection:
    """Return the selection that is attached to a model.

    Raises:
        ModelError: none is.
    """
    found: Selection | None = getattr(model, "esft_selection", None)
    if found is None:
        raise ModelError(_NONE)
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

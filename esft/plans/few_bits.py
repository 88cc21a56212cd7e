"""A model without content whose frozen weights are in few bits, as `frozen_dtype` loads it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from esft_kernels.quantised import Quantised
from torch import Tensor

from esft.banks import Split
from esft.layouts.layout import UNREAD
from esft.moe import MoeLayer, moe_layers
from esft.quantising.checkpoint import replace_weight, tied_names
from esft.quantising.parts import EXPERTS, stored_kinds
from esft.trained_parts import TrainedParts


def store_frozen(model: Any, kinds: Mapping[str, str], trained: TrainedParts) -> int:
    """Keep a model's frozen weights in few bits; see `esft.quantising.checkpoint.load_quantised`.

    Args:
        model: of tensors without content; the experts among its weights are split, and those that
            do not train made smaller, when a selection is attached.
        kinds: `int8` or `nf4` by part.
        trained: what trains beside the selected experts, and so stays.

    Returns:
        the bytes of the largest weight that is read as it was stored before it is made smaller.

    Raises:
        ModelError: the model's experts cannot be kept so.
    """
    layers = moe_layers(model)
    stored = stored_kinds(model, layers, kinds, trained)
    largest = 0
    experts: set[str] = set()
    for layer in layers:
        shapes = layer.layout.shapes()
        experts |= {name for weight in shapes for name in layer.layout.tensor_names(weight)}
        if EXPERTS not in kinds:
            continue
        dtype = model.get_parameter(layer.layout.tensor_names(next(iter(shapes)))[0]).dtype
        layer.layout.host.__dict__[UNREAD] = partial(_split, layer, kinds[EXPERTS], dtype)
        largest = max(largest, sum(s[1:].numel() for s in shapes.values()) * dtype.itemsize)
    for names in tied_names(model):
        if names[0] not in stored or names[0] in experts:
            continue
        weight = model.get_parameter(names[0])
        largest = max(largest, weight.nbytes)
        small = Quantised.empty(weight.shape, stored[names[0]], dtype=weight.dtype)
        for name in names:
            replace_weight(model, name.removesuffix(".weight"), small)
    return largest


def _split(layer: MoeLayer, kind: str, dtype: torch.dtype, selected: list[int]) -> Split:
    """Make a layer's two banks: the selected experts as they are, the others in few bits."""
    chosen: dict[str, Tensor] = {}
    rest: dict[str, Tensor | Quantised] = {}
    for weight, shape in layer.layout.shapes().items():
        inner, others = shape[1:], (shape[0] - len(selected), *shape[1:])
        chosen[weight] = torch.empty(len(selected), *inner, dtype=dtype)
        rest[weight] = (
            Quantised.empty(others, kind, dtype=dtype)
            if len(inner) > 1  # biases are small, and stay
            else torch.empty(others, dtype=dtype)
        )
    return Split(chosen, rest)

"""Gradients clipped to a norm, also where processes share a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esft.experts import attached_layers, is_shared
from esft.moe import trainable_parameters
from esft.processes import summed


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients down so that their norm is at most `max_norm`, and return what it was.

    As `torch.nn.utils.clip_grad_norm_`, which sees the part of a shared model's gradients that is
    in its own process: there, each would scale by another factor. All processes that share the
    model must call this.

    Args:
        model: a selection is attached.
        max_norm: of all gradients together.

    Raises:
        ElsewhereError, LostProcessError: see `esft.processes.together`.
    """
    alone, everywhere = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    gradients = []
    for gradient, is_part in _gradients(model):
        gradients.append(gradient)
        squares = gradient.double().square().sum().cpu()
        if is_part:
            alone += squares
        else:
            everywhere += squares
    if is_shared(model):
        (alone,) = summed([alone], "clip gradients")
    norm = float((alone + everywhere).sqrt())
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))  # torch's own epsilon
    return norm


def _gradients(model: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """Yield gradients, and whether each is a part that is in this process alone."""
    parts = {
        id(parameter)
        for layer in attached_layers(model)
        if getattr(layer.banks, "held", None) is not None
        for parameter in layer.banks.trainable.values()
    }
    for parameter in trainable_parameters(model).values():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            yield gradient.to_local(), not all(p.is_replicate() for p in gradient.placements)
        elif gradient is not None:
            yield gradient, id(parameter) in parts

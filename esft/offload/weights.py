"""One expert's weights, as a store gives them and the cache holds them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from esft_kernels.quantised import Quantised
from torch import Tensor

# Name of a weight, as in `layer.layout.shapes()` -> its slice `[...]`.
Weights = dict[str, Tensor | Quantised]


def weight_bytes(weights: Weights) -> int:
    """Return the bytes that an expert's weights take."""
    return sum(weight.nbytes for weight in weights.values())


def dense(weights: Weights) -> dict[str, Tensor]:
    """Return an expert's weights as they are computed with; those that are dense already, as is."""
    return {
        name: weight.dequantise() if isinstance(weight, Quantised) else weight
        for name, weight in weights.items()
    }


def moved(weights: Weights, device: torch.device) -> Weights:
    """Return an expert's weights on a device, to which a GPU's host need not wait to copy them."""
    return {name: weight.to(device, non_blocking=True) for name, weight in weights.items()}


def pinned(weights: Weights) -> Weights:
    """Return an expert's weights in page-locked memory of the host."""
    return {
        name: weight.each(Tensor.pin_memory)
        if isinstance(weight, Quantised)
        else weight.pin_memory()
        for name, weight in weights.items()
    }


def plain_tensors(weights: Weights) -> Iterator[tuple[str, str, Tensor]]:
    """Yield every tensor that holds a part of an expert: the weight's name, the part's own."""
    for name, weight in weights.items():
        if isinstance(weight, Quantised):
            for part, tensor in weight.tensors().items():
                yield name, part, tensor
        else:
            yield name, "", weight

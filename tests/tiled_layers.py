"""Layers for tests of the Triton path: every layout and activation, small enough to interpret."""

from __future__ import annotations

from typing import Any

import torch
from esft_kernels import ExpertBank, SwiGLU
from expert_layers import clamped, inputs, make_bank, relu2, swiglu
from torch import Tensor

HIDDEN, INNER = 33, 14
"""No multiple of a tile's 32 columns; the wider has two tiles."""
STYLES: dict[str, dict[str, Any]] = {
    "swiglu": {"activation": SwiGLU()},
    "swiglu interleaved": {"activation": SwiGLU(interleaved=True)},
    "swiglu transposed": {"activation": SwiGLU(), "transposed": True},
    "swiglu interleaved with biases": {"activation": SwiGLU(interleaved=True), "bias": True},
    "any function": {"activation": swiglu},
    "any function with biases": {"activation": clamped, "bias": True},
    "any function transposed with biases": {
        "activation": clamped,
        "bias": True,
        "transposed": True,
    },
    "no gate": {"activation": relu2, "gated": False},
    # Its result is a view, as is its gradient, without memory of their own.
    "one sum for all": {
        "activation": lambda z: z.sum(-1, keepdim=True).expand_as(z),
        "gated": False,
    },
}


def layer(selected: list[int], style: str = "swiglu", **how: Any) -> ExpertBank:
    """Draw a bank in one of `STYLES`."""
    how = {"dtype": torch.float32, "hidden": HIDDEN, "inner": INNER} | STYLES[style] | how
    return make_bank(selected, **how)


def tokens(
    count: int, k: int = 2, dtype: torch.dtype = torch.float32, only: int | None = None
) -> list[Tensor]:
    """Draw x, ids and weights for `layer`."""
    return inputs(count, k, dtype, only, HIDDEN)

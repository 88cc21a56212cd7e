"""What an optimizer keeps for each parameter, and the optimizer itself where torch has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

_BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit states
_SMALL = 4096  # smaller parameters keep 32-bit states there
# Numbers kept for each of a parameter's.
_STATES = {
    "adamw": 2,
    "sgd": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "lion": 1,
    "ademamix": 3,
}


def optimizer_name(training: Mapping[str, Any]) -> str:
    """Return the optimizer that a recipe's `training` section comes to."""
    from transformers import TrainingArguments

    return str(training.get("optim") or TrainingArguments.default_optim)


def state_bytes(name: str, parameters: Iterable[torch.Size], itemsize: int) -> int:
    """Return the bytes of an optimizer's state, without the few of its step counters.

    Args:
        name: as `training.optim`.
        parameters: shapes of those that train.
        itemsize: bytes of one number of theirs.
    """
    return sum(_state_of(name, shape, itemsize) for shape in parameters)


def _state_of(name: str, shape: torch.Size, itemsize: int) -> int:
    if name == "adafactor":
        # Of a matrix the mean squares of its rows and columns (arXiv 1804.04235), always fp32.
        if len(shape) < 2:
            return 4 * shape.numel()
        return 4 * (shape[:-1].numel() + shape[:-2].numel() * shape[-1])
    kept = next(n for kind, n in _STATES.items() if kind in name)
    if "8bit" in name and shape.numel() >= _SMALL:
        return kept * (shape.numel() + 4 * -(-shape.numel() // _BLOCK))
    # bitsandbytes keeps fp32 states whatever the parameters are; torch, the parameters' dtype.
    wide = 4 if any(mark in name for mark in ("bit", "bnb", "ademamix")) else itemsize
    return kept * shape.numel() * wide


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return the optimizer as transformers' Trainer would make it; None for bitsandbytes'."""
    from transformers.optimization import Adafactor

    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
        "adamw_torch": torch.optim.AdamW,
        "adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    return makers[name](parameters) if name in makers else None

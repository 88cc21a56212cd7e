"""FSDP2: every process keeps a part of each tensor; they are put together to be saved.

accelerate shards the model when training begins, after the selection has been attached, so that
what trains is sharded, too, and its gradients are reduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from esft import processes
from esft.banks import TrainedExperts


def is_sharded(model: nn.Module) -> bool:
    """Whether processes keep parts of a model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Any) -> Any:
    """Return nested values with every sharded tensor put together; all processes must call this."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def as_kept(value: Tensor, kept: Tensor) -> Tensor:
    """Return a whole tensor as `kept` is: this process's part of it, or all of it."""
    if not isinstance(kept, DTensor):
        return value
    device = kept.to_local().device
    # No process sends anything: each cuts its part from its own copy.
    return distribute_tensor(
        value.to(device), kept.device_mesh, kept.placements, src_data_rank=None
    )


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let the first process see what trains, and what belongs to it, whole inside the block.

    All processes must enter it. The whole tensors are in host memory, one after another; parts
    come back after the block. Does nothing where nothing is sharded.
    """
    parts: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module, name, parameter in _saved(model):
            if not isinstance(parameter, DTensor):
                continue
            found = parameter.full_tensor().detach()
            if processes.is_main():
                parts.append((module, name, parameter))
                own = nn.Parameter(found.cpu(), requires_grad=parameter.requires_grad)
                module._parameters[name] = own
            del found
        yield
    finally:
        for module, name, parameter in parts:
            module._parameters[name] = parameter


def _saved(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield every parameter that a delta is made of, with its module and its name there."""
    banks = [module for module in model.modules() if isinstance(module, TrainedExperts)]
    # Under factors a bank itself is frozen.
    chosen = {id(p) for bank in banks for p in bank.trainable.parameters()}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and (parameter.requires_grad or id(parameter) in chosen):
                yield module, name, parameter


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process keeps, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def finite(tensor: Tensor) -> bool:
    """Whether this process's part of a tensor has no NaN or infinity."""
    return bool(torch.isfinite(local(tensor.detach())).all())

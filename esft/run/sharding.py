"""FSDP2: every process keeps a part of each tensor; they are put together to be saved.

accelerate shards the model when training begins, after the selection has been attached, so that
what trains is sharded, too, and its gradients are reduced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from esft import processes
from esft.banks import TrainedExperts
from esft.errors import RecipeError, nearest
from esft.recipe_sections import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments


# What of `training.fsdp_config` may be set. The rest is of FSDP1 or of other devices, or it is for
# checkpoints, which esft writes itself.
_CONFIG = (
    "version",
    "reshard_after_forward",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
)


# Whose state is made of the parameters that they step, when they first step them. Adagrad makes it
# before the model is sharded, Adafactor calculates with parts of it that are not.
_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "rmsprop")


def asked_for(arguments: TrainingArguments) -> bool:
    """Whether the recipe, or `accelerate launch`, asks for FSDP."""
    return bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def check_sharding(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Refuse what does not go with FSDP, and have every process load the whole model.

    Each of them profiles a part of the sample, and selects, before the model is sharded.

    Raises:
        RecipeError: names the key and says why.
    """
    if not asked_for(arguments):
        return
    for key in recipe.training.get("fsdp_config") or {}:
        if key.removeprefix("fsdp_") not in _CONFIG:
            raise RecipeError(
                f"training.fsdp_config: {key}: cannot be set{nearest(key, _CONFIG)}; known are "
                f"{', '.join(_CONFIG)}"
            )
    # accelerate launch turns it on by itself; all but the first process would have no weights.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin = _plugin(arguments)
    if processes.count() == 1:
        raise RecipeError(
            "training.fsdp: shares the model among processes, and there is one; launch several: "
            "torchrun --nproc-per-node 2 -m esft_cli train ..."
        )
    if plugin.fsdp_version != 2:
        raise RecipeError("training.fsdp: FSDP1 is not supported; set its version to 2")
    if plugin.activation_checkpointing:
        raise RecipeError(
            "training.fsdp_config: activation_checkpointing renames what trains; set "
            "training.gradient_checkpointing: true instead"
        )
    if recipe.training.get("fp16"):
        raise RecipeError("training.fp16: its gradient scaler does not go with FSDP; use bf16")
    if recipe.frozen.kinds:
        raise RecipeError(
            "frozen_dtype: FSDP shards parameters, and these are stored otherwise: every process "
            "would keep all of them; leave out frozen_dtype, or FSDP"
        )
    optimizer = str(recipe.training.get("optim") or _OPTIMIZERS[0])
    if optimizer not in _OPTIMIZERS:
        raise RecipeError(
            f"training.optim: {optimizer} does not go with FSDP: its state is not sharded as "
            f"parameters are; use one of {', '.join(_OPTIMIZERS)}"
        )


def shard_on_cpu(accelerator: Any, arguments: TrainingArguments) -> None:
    """Have accelerate shard on CPUs, too, where FSDP is asked for.

    It turns FSDP on for its list of accelerators only (`AcceleratorState.__init__`, 1.15), and on a
    CPU replicates without a word; its `fully_shard` calls work there as well.
    """
    if accelerator.device.type != "cpu" or not asked_for(arguments):
        return
    accelerator.state.fsdp_plugin = _plugin(arguments)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)


def _plugin(arguments: TrainingArguments) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(**(arguments.fsdp_plugin_args or {}))


def reshard(model: nn.Module) -> None:
    """Let every process keep its part again of what is whole since the last forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
    reshard(model)
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

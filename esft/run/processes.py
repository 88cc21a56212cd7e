"""What a run of several processes needs, and what it cannot do: told before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from esft import processes
from esft.errors import ElsewhereError, EsftError, LostProcessError, RecipeError
from esft.recipe_sections import Recipe

# As torchrun, and as MPI's launchers, say how many processes there are.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Orders that every process draws alike, whatever its share of the rows.
_ORDERS = ("random", "sequential")


def check_launch() -> None:
    """Refuse a launcher whose processes could not find each other, or that asks for DeepSpeed.

    Raises:
        EsftError: one of several processes was started without torchrun's variables; each would
            train the whole run by itself. Or accelerate is configured for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise EsftError(
            "ACCELERATE_USE_DEEPSPEED: accelerate is configured for DeepSpeed, from whose buffers "
            "no delta is written; launch without it, and set training.fsdp, which shards as much"
        )
    for name in _SIZES:
        given = os.environ.get(name, "")
        if given.isdecimal() and int(given) > 1 and processes.count() == 1:
            raise EsftError(
                f"{name}={given}: launched as {given} processes that are not told where to find "
                f"each other (RANK, MASTER_ADDR, MASTER_PORT); start them with torchrun or "
                f"accelerate launch: torchrun --nproc-per-node {given} -m esft_cli train ..."
            )


def check_recipe(recipe: Recipe) -> None:
    """Refuse what a recipe asks for and several processes cannot do; one can do everything.

    Raises:
        RecipeError: names the key and says why.
    """
    count = processes.count()
    if count == 1:
        return
    training = recipe.training
    order = str(training.get("train_sampling_strategy") or "random")
    if order not in _ORDERS:
        raise RecipeError(
            f"training.train_sampling_strategy: {order}: each of {count} processes would draw an "
            f"order of its own; use one of {', '.join(_ORDERS)}"
        )
    if training.get("average_tokens_across_devices") is False:
        raise RecipeError(
            "training.average_tokens_across_devices: false: the loss of a step is divided by the "
            "supervised tokens of all processes; leave it out"
        )
    if recipe.device is not None and ":" in recipe.device:
        raise RecipeError(
            f"device: {recipe.device}: {count} processes would share one; each takes its own, "
            f"leave it out"
        )


def device_of(recipe: Recipe) -> str | None:
    """Return the device that this process loads the model on, as `esft.loading` takes it."""
    several = processes.count() > 1
    if several and recipe.device in (None, "cuda") and torch.cuda.is_available():
        return f"cuda:{processes.local_rank()}"
    return recipe.device


def step_shape(arguments: Any) -> dict[str, int]:
    """Return what the rows of an optimizer step are split into, for `esft.run.guard`."""
    return {
        "processes": processes.count(),
        "batch": arguments.per_device_train_batch_size,
        "accumulated": arguments.gradient_accumulation_steps,
    }


def once(error: EsftError) -> EsftError:
    """Return an error that all processes raise as the one that this process is to raise.

    The first one tells the user; the others end silently.
    """
    return error if processes.is_main() else ElsewhereError(str(error))


@contextmanager
def explain_loss() -> Iterator[None]:
    """Turn what a collective call raises when another process is gone into an error that says so.

    Raises:
        LostProcessError: another process ended, or did not answer in time.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if processes.count() == 1 or not _is_loss(error):
            raise
        raise LostProcessError(
            f"process {processes.rank()} of {processes.count()}: another process ended, or did not "
            f"answer within {processes.timeout().total_seconds():,g} s ({processes.TIMEOUT}), "
            f"while they train; what it said itself tells why, and if it said nothing it was "
            f"killed, as by a lack of memory"
        ) from error


def _is_loss(error: Exception) -> bool:
    # Of gloo, whose errors have no class of their own; NCCL's have.
    return isinstance(error, dist.DistError) or "gloo" in str(error)

"""Memory that runs out while a model trains: how far it got, what it used, what to lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from esft.errors import EsftError
from esft.recipe_sections import Recipe
from esft.run.memory import peak_memory

# Of the allocator for CPUs, which raises a plain RuntimeError.
_ON_CPU = ("can't allocate memory", "not enough memory")


@contextmanager
def explain_out_of_memory(
    recipe: Recipe, device: torch.device, when: Callable[[], str]
) -> Iterator[None]:
    """Turn the lack of memory inside the block into an error that says what to do.

    Args:
        recipe: what trains, `training` section complete.
        device: that it trains on.
        when: says what was being done: "in step 3".

    Raises:
        EsftError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        raise EsftError(_message(recipe, device, when())) from error


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _ON_CPU)


def _message(recipe: Recipe, device: torch.device, when: str) -> str:
    batch = recipe.training.get("per_device_train_batch_size", 8)  # transformers' default
    unit = "blocks" if recipe.data.packing else "rows"
    steps = [
        "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps by "
        "the same factor: the result stays)"
    ]
    if batch == 1:
        steps = []
    steps.append("data.max_length")
    if recipe.selects_experts:
        steps.append("the number of experts (selection.p)")
    more = (
        ""
        if recipe.training.get("gradient_checkpointing")
        else "; training.gradient_checkpointing: true needs less, and takes longer"
    )
    return (
        f"{device} ran out of memory {when}: {peak_memory(device) / 1e9:.2f} GB were in use at "
        f"most, in batches of {batch:,} {unit} of up to {recipe.data.max_length:,} tokens; lower "
        f"{', or '.join(steps)}{more}"
    )

"""From a rehearsal to a case of a plan: memory, disk, operations."""

from __future__ import annotations

from typing import Any

import torch

from esft.plans.batch import Batch
from esft.plans.counts import Chosen
from esft.plans.records import Case, Disk, Memory
from esft.plans.rehearsal import Rehearsed, rehearse
from esft.plans.stored import Stored
from esft.recipe_sections import Recipe


def make_case(
    recipe: Recipe,
    config: Any,
    *,
    device: str,
    dtype: torch.dtype,
    stored: Stored,
    total: int,
    chosen: Chosen,
    batch: Batch,
    profiled: tuple[int, int] | None,
    before: int | None,
) -> Case:
    """Rehearse a run and say what it takes.

    Args:
        recipe: of the run.
        config: of the model.
        device: `cpu` or `cuda`.
        dtype: that weights are loaded in.
        stored: the checkpoint on disk.
        total: parameters of the model.
        chosen: the experts that train.
        batch: what each step sees.
        profiled: rows and tokens of each that routing drift is measured on at once, before
            training and after; None for none.
        before: the most memory while experts are scored to select some, before the model is made
            ready; 0 where none are, None where that is not known.
    """
    width = stored.dtype.itemsize
    found = rehearse(
        recipe, config, dtype, chosen, batch, width=width, device=device, profiled=profiled
    )
    per_layer = chosen.per_layer()
    return Case(
        experts=sum(per_layer),
        fewest=min(per_layer, default=0),
        most=max(per_layer, default=0),
        trained=found.parameters,
        share=found.parameters / total,
        memory=_memory(found, device, stored, total, before),
        disk=_disk(found, recipe, stored),
        flops=found.flops,
        obstacle=found.obstacle,
    )


def _memory(
    found: Rehearsed, device: str, stored: Stored, total: int, before: int | None
) -> Memory:
    start = 0
    # `esft.training` keeps it where less than half of the model trains; `StartingPoint` in the
    # checkpoint's dtype, and adapters, which begin as random numbers, in fp32.
    if device == "cpu" and 2 * found.parameters < total:
        width = found.trained // found.parameters
        start = found.parameters * (width if found.adapter else min(width, stored.dtype.itemsize))
    profiling = found.profiling and found.profiling + start
    fixed = found.frozen + found.trained + found.gradients + found.optimizer
    return Memory(
        frozen=found.frozen,
        trained=found.trained,
        gradients=found.gradients,
        optimizer=found.optimizer,
        start=start,
        activations=None if found.training is None else max(0, found.training - fixed),
        loading=found.loading + start,
        training=None if found.training is None else max(found.training, fixed) + start,
        profiling=None if profiling is None or before is None else max(profiling, before),
        evaluation=found.evaluation and found.evaluation + start,
    )


def _disk(found: Rehearsed, recipe: Recipe, stored: Stored) -> Disk:
    delta = found.trained if found.adapter else found.parameters * stored.dtype.itemsize
    checkpoint = found.trained + found.optimizer
    saves = str(recipe.training.get("save_strategy", "no")) != "no"
    best = int(bool(recipe.training.get("load_best_model_at_end")))
    kept = recipe.checkpoints.keep_last + max(recipe.checkpoints.keep_best, best)
    return Disk(
        delta=delta,
        checkpoint=checkpoint,
        checkpoints=(kept + 1) * checkpoint if saves else 0,
        merged=stored.bytes,
    )

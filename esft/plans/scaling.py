"""Several processes, one a device: memory of each, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from esft.plans.records import Case, Processes
from esft.recipe_sections import Recipe

_GATHERED = 2  # layers that FSDP2 holds whole at a time: one computes, the next is fetched
_MOST = 1024


@dataclass(frozen=True)
class Whole:
    """A run in one process, of which several take their parts.

    Attributes:
        case: what it needs.
        largest: bytes of the largest layer's weights, see `esft.plans.parameters.largest_layer`.
        experts: bytes of all routed experts' weights as they are loaded.
        width: bytes of one of these weights.
        shards: whether FSDP2 takes such a run, see `esft.run.sharding`.
        splits: whether nothing but selected experts trains, and no weight is in few bits.
        stored: bytes of the checkpoint.
    """

    case: Case
    largest: int
    experts: int
    width: int
    shards: bool
    splits: bool
    stored: int

    @classmethod
    def of(
        cls, recipe: Recipe, case: Case, *, largest: int, experts: int, width: int, stored: int
    ) -> Whole:
        """Look at what a recipe trains, and how."""
        plain = not recipe.frozen.kinds
        parts = any(recipe.train.parts.values()) if recipe.train else False
        splits = plain and recipe.trains_experts and not parts
        shards = plain and recipe.method != "lora"
        return cls(case, largest, experts, width, shards, splits, stored)


def scaled(whole: Whole, count: int) -> Processes:
    """Return what each of several devices needs; the batch on each is the recipe's.

    Args:
        whole: the run in one process.
        count: of processes.
    """
    memory = whole.case.memory
    if memory.activations is None or memory.profiling is None or memory.evaluation is None:
        return Processes(count, None, None, None, None, whole.stored)
    state = memory.trained + memory.gradients + memory.optimizer
    rest = memory.start + memory.activations
    buckets = memory.gradients if count > 1 else 0
    gathered = _GATHERED * whole.largest if count > 1 else 0
    loading = max(memory.loading, memory.profiling, memory.evaluation)
    replicated = memory.frozen + state + rest + buckets
    # Experts that do not train; those that do are in `trained`.
    frozen = whole.experts - whole.case.trained * whole.width
    return Processes(
        count=count,
        loading=loading,
        replicated=max(replicated, loading),
        sharded=-(-(memory.frozen + state) // count) + rest + gathered if whole.shards else None,
        by_expert=memory.frozen - frozen + -(-(frozen + state) // count) + rest
        if whole.splits
        else None,
        node=whole.stored,
    )


def fewest_shards(whole: Whole, limit: int) -> int | None:
    """Return the lowest power of two of processes whose shards fit, or None."""
    count = 2
    while count <= _MOST:
        sharded = scaled(whole, count).sharded_peak
        if sharded is not None and sharded <= limit:
            return count
        count *= 2
    return None

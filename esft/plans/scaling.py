"""Several processes, one a device: memory of each, by formula."""

from __future__ import annotations

from esft.plans.records import Memory, Processes

_GATHERED = 2  # layers that FSDP2 holds whole at a time: one computes, the next is fetched
_MOST = 1024


def scaled(memory: Memory, count: int, largest: int) -> Processes:
    """Return what each of several devices needs; the batch on each is the recipe's.

    Args:
        memory: with one process.
        count: of processes.
        largest: bytes of the largest layer's weights, see `esft.plans.parameters.largest_layer`.
    """
    if memory.activations is None:
        return Processes(count, None, None)
    fixed = memory.frozen + memory.trained + memory.gradients + memory.optimizer
    rest = memory.start + memory.activations
    buckets = memory.gradients if count > 1 else 0
    gathered = _GATHERED * largest if count > 1 else 0
    return Processes(
        count=count,
        replicated=fixed + rest + buckets,
        sharded=-(-fixed // count) + rest + gathered,
    )


def fewest_shards(memory: Memory, limit: int, largest: int) -> int | None:
    """Return the lowest power of two of processes whose shards fit, or None."""
    count = 2
    while count <= _MOST:
        sharded = scaled(memory, count, largest).sharded
        if sharded is not None and sharded <= limit:
            return count
        count *= 2
    return None

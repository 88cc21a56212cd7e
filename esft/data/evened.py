"""The same order of items for several processes, made even at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler


class Evened(Sampler[int]):
    """Draws as another sampler does, and then indices beyond the set's until all shares are full.

    accelerate gives process r of n the batches r, r + n, ... of an epoch, and fills the last ones
    with rows from its beginning, which would be learnt twice. An index of `items` or more stands
    for an item without labels instead (see `esft.data.numbered.Numbered`), so that the steps of an
    epoch have the same rows however many processes share them.

    Args:
        sampler: draws each item once.
        items: how many the set has.
        multiple: the number drawn is made one of this: rows of a batch times processes.
    """

    def __init__(self, sampler: Sampler[int], items: int, multiple: int) -> None:
        self._sampler, self._items, self._multiple = sampler, items, multiple

    def __len__(self) -> int:
        drawn = len(self._sampler) if isinstance(self._sampler, Sized) else self._items
        return drawn + -drawn % self._multiple

    def __iter__(self) -> Iterator[int]:
        drawn = 0
        for index in self._sampler:
            drawn += 1
            yield index
        yield from range(self._items, self._items + -drawn % self._multiple)

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler which epoch's order to draw."""
        set_epoch: Any = getattr(self._sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)

"""A train set whose batches say which items they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from esft.data.packing import TrainSet

ITEMS = "items"  # key of a batch: indices of its items, a list


class Numbered(Dataset[dict[str, Any]]):
    """The same items, each with its index, and a collator that keeps the indices.

    Args:
        train_set: what to number.
        collate: makes a batch of its items.
    """

    def __init__(
        self, train_set: TrainSet, collate: Callable[[Sequence[Any]], dict[str, Any]]
    ) -> None:
        self._train_set, self._collate = train_set, collate

    def __len__(self) -> int:
        return len(self._train_set)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._train_set[index], ITEMS: index}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch, with the indices of its items at `ITEMS`, which no model takes."""
        indices = [item[ITEMS] for item in items]
        plain = [{key: item[key] for key in item if key != ITEMS} for item in items]
        return {**self._collate(plain), ITEMS: indices}

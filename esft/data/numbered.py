"""A train set whose batches say which items they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from esft.data.example import IGNORED
from esft.data.packing import TrainSet

ITEMS = "items"  # key of a batch: indices of its items, a list


class Numbered(Dataset[dict[str, Any]]):
    """The same items, each with its index, and a collator that keeps the indices.

    An index beyond the set's length gives an item without labels. A process that has no rows left
    when others have (see `esft.data.evened.Evened`) takes part in their step with one of these.

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
        if index < len(self):
            return {**self._train_set[index], ITEMS: index}
        item = self._train_set[0]
        unlearnt: dict[str, Any] = {"labels": [IGNORED] * len(item["labels"]), ITEMS: index}
        return item | unlearnt

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Iterating by index would never end: there is an item at each.
        return (self[index] for index in range(len(self)))

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch, with the indices of its items at `ITEMS`, which no model takes.

        Items without labels are left out, but for one of a batch that has no others; no index
        stands for it.
        """
        real = [item for item in items if item[ITEMS] < len(self)]
        plain = [
            {key: item[key] for key in item if key != ITEMS} for item in (real or list(items[:1]))
        ]
        return {**self._collate(plain), ITEMS: [item[ITEMS] for item in real]}

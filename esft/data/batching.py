"""Rows of unequal length to batches with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """An order for training in which rows of like length are neighbours, other in each epoch.

    Rows are shuffled, then sorted within groups of many batches, the longest first; transformers'
    `train_sampling_strategy: group_by_length`. There, the order comes from torch's global random
    state, which a resumed run meets later in the epoch; here, from seed and epoch.

    Args:
        lengths: of the rows, in tokens.
        at_once: rows of an optimizer step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], at_once: int, seed: int) -> None:
        self._lengths, self._at_once, self._seed = list(lengths), at_once, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from get_length_grouped_indices(self._lengths, self._at_once, generator=generator)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Group rows where order does not matter, the longest first: lack of memory shows at once.

    Args:
        lengths: of each row, in tokens.
        tokens: in a batch at most, padding included; a longer row goes alone.

    Yields:
        indices of the rows of a batch.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows padded on the right, and where they are not padding; both `[B, S]`, int64."""
    values = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
    real = torch.zeros_like(values)
    for place, row in enumerate(rows):
        values[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
        real[place, : len(row)] = 1
    return values, real

"""Rows of unequal length to padded batches, where order does not matter: profiling, scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Group rows of like length, the longest first: lack of memory shows at once.

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

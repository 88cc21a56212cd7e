"""Batches of rows of like length, and their padding."""

from __future__ import annotations

import random

import pytest

from esft.data.batching import batches, padded


@pytest.mark.parametrize("tokens", [1, 7, 40, 10_000])
def test_every_row_is_in_one_batch_and_batches_keep_their_size(tokens: int) -> None:
    drawn = random.Random(0)
    lengths = [drawn.randrange(1, 30) for _ in range(100)]
    found = list(batches(lengths, tokens))
    assert sorted(row for batch in found for row in batch) == list(range(100))
    in_order = [lengths[row] for batch in found for row in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch, after in zip(found, [*found[1:], []], strict=True):
        size = lengths[batch[0]]
        assert len(batch) == 1 or size * len(batch) <= tokens
        if after:  # one more row would not have fitted
            assert size * (len(batch) + 1) > tokens


def test_no_rows() -> None:
    assert list(batches([], 10)) == []


def test_padding() -> None:
    values, real = padded([[5, 6], [7]], fill=9)
    assert values.tolist() == [[5, 6], [7, 9]]
    assert real.tolist() == [[1, 1], [1, 0]]

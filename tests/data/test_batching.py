"""Batches of rows of like length, and their padding."""

from __future__ import annotations

import random

import pytest
import torch

from esft.data.batching import LengthGrouped, batches, padded


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


def orders(lengths: list[int], epochs: int, *, seed: int = 3) -> list[list[int]]:
    sampler = LengthGrouped(lengths, 4, seed)
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_neighbours_in_training_have_like_lengths() -> None:
    drawn = random.Random(0)
    lengths = [drawn.randrange(1, 500) for _ in range(400)]
    first, second = orders(lengths, 2)
    assert sorted(first) == sorted(second) == list(range(400))
    assert first != second
    assert lengths[first[0]] == max(lengths)  # lack of memory shows at once

    def padding(order: list[int]) -> int:
        steps = [[lengths[row] for row in order[i : i + 4]] for i in range(0, 400, 4)]
        return sum(max(step) * len(step) - sum(step) for step in steps)

    assert padding(first) < padding(list(range(400))) / 4


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(40))
    expected = orders(lengths, 3)
    torch.manual_seed(123)  # a resumed run has drawn other numbers before
    resumed = LengthGrouped(lengths, 4, 3)
    resumed.set_epoch(2)
    assert list(resumed) == expected[2]
    assert orders(lengths, 1, seed=4) != expected[:1]

"""Figures of a task set against a count by hand."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.data.example import Example
from esft.data.fitting import fit
from esft.data.packing import pack, separate
from esft.data.statistics import Bin, measure, measure_lengths


def example(prompt: int, answer: int, first: int = 5) -> Example:
    return Example([first, *[6] * (prompt + answer - 1)], [False] * prompt + [True] * answer, "f:1")


def test_a_set_counted_by_hand() -> None:
    rows = [
        example(2, 3),
        example(2, 3),  # again
        example(3, 2),  # the same tokens, other ones learnt
        example(2, 3, first=7),
        example(4, 8),  # does not fit
    ]
    test = [example(1, 4), example(1, 4, first=8)]  # the first one's tokens are a training row's
    fitted = fit(rows, 10)
    packed = measure(rows, fitted, pack(fitted.examples, 10, pad_id=0), 10, test)
    assert (packed.rows_encoded, packed.rows, packed.too_long, packed.duplicates) == (5, 4, 1, 1)
    assert (packed.tokens, packed.supervised) == (20, 3 + 3 + 2 + 3)
    assert (packed.blocks, packed.fill) == (2, 1.0)
    assert (packed.eval_rows, packed.eval_supervised, packed.overlap) == (2, 8, 1)
    assert packed.truncation["dropped"] == 1
    assert packed.lengths.bins == [Bin(5, 8, 4), Bin(9, 10, 0), Bin(11, 16, 1)]
    apart = measure(rows, fitted, separate(fitted.examples, 10), 10)
    assert (apart.blocks, apart.fill, apart.eval_rows, apart.overlap) == (None, None, 0, 0)
    assert not apart.weighted
    assert json.loads(json.dumps(packed.to_dict()))["lengths"]["bins"][2] == {
        "shortest": 11,
        "longest": 16,
        "rows": 1,
    }


def test_the_fill_counts_no_padding() -> None:
    rows = [example(2, 3), example(2, 4)]
    figures = measure(rows, fit(rows, 8), pack(rows, 8, pad_id=6), 8)
    assert (figures.blocks, figures.fill) == (2, 11 / 16)


def test_weights_are_told_of() -> None:
    row = Example([5, 6, 6], [False, True, True], "f:1", [1.0, 1.0, 2.0])
    assert measure([row], fit([row], 8), separate([row], 8), 8).weighted


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(2, 300))
@settings(deadline=None, derandomize=True)
def test_lengths(lengths: list[int], max_length: int) -> None:
    found = measure_lengths(lengths, max_length)
    ordered = sorted(lengths)
    assert (found.shortest, found.longest) == (ordered[0], ordered[-1])
    assert found.mean == pytest.approx(sum(lengths) / len(lengths))
    for name, at in found.percentiles.items():
        rank = math.ceil(int(name[1:]) * len(ordered) / 100)
        assert at == ordered[rank - 1], name
    assert sum(bin.rows for bin in found.bins) == len(lengths)
    for bin in found.bins:
        assert bin.rows == sum(bin.shortest <= length <= bin.longest for length in lengths)
        # No bin has rows that fit and rows that do not.
        assert bin.longest <= max_length or bin.shortest > max_length
    for before, after in zip(found.bins, found.bins[1:], strict=False):
        assert after.shortest == before.longest + 1
    assert found.bins[0].rows > 0
    assert found.bins[-1].rows > 0

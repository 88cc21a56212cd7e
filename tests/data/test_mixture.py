"""Shares of a mixture, against what defines them, in whole numbers."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.data.mixture import mix, shares

SIZES = st.integers(1, 60)
WEIGHTS = st.sampled_from([1, 2, 3, 0.5, 0.1, 0.3, 7.25])


@pytest.mark.parametrize(
    ("sizes", "weights", "first", "last"),
    [
        ([100, 100], [1, 1], [100, 100], [100, 100]),
        ([100, 1000], [2, 1], [100, 50], [2000, 1000]),
        ([100, 1000], [1, 2], [100, 200], [500, 1000]),
        ([10, 10, 10], [1, 1, 2], [5, 5, 10], [10, 10, 20]),
        # 0.1 + 0.2 is not 0.3 in floating point; here it is.
        ([10, 20, 30], [0.1, 0.2, 0.3], [10, 20, 30], [10, 20, 30]),
        ([5], [3], [5], [5]),
        ([1, 100], [1, 100], [1, 100], [1, 100]),
        ([2, 1], [2, 1.5], [1, 1], [2, 2]),
        ([1, 1000], [1, 1000.5], [1, 999], [1, 1001]),
    ],
)
def test_examples(
    sizes: list[int], weights: list[float], first: list[int], last: list[int]
) -> None:
    assert shares(sizes, weights) == first
    assert shares(sizes, weights, "all_exhausted") == last


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.tuples(SIZES, WEIGHTS), min_size=1, max_size=5))
def test_the_shares_are_exact_and_no_other_size_would_do(
    sources: list[tuple[int, float]],
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    exact = [Fraction(str(weight)) / sum(map(Fraction, map(str, weights))) for weight in weights]
    for strategy in ("first_exhausted", "all_exhausted"):
        counts = shares(sizes, weights, strategy)
        rows = sum(counts)
        for count, share in zip(counts, exact, strict=True):
            assert abs(count - rows * share) < 1
        if strategy == "first_exhausted":
            assert all(count <= size for count, size in zip(counts, sizes, strict=True))
            more = rows + 1
            assert any(more * share > size for share, size in zip(exact, sizes, strict=True))
        else:
            assert all(count >= size for count, size in zip(counts, sizes, strict=True))
            fewer = rows - 1
            assert any(fewer * share < size for share, size in zip(exact, sizes, strict=True))


def test_rows_are_drawn_once_before_any_is_drawn_twice() -> None:
    sources = [[f"a{i}" for i in range(10)], [f"b{i}" for i in range(4)]]
    drawn = mix(sources, [5, 11], seed=3)
    counted = Counter(drawn)
    assert sum(count for row, count in counted.items() if row[0] == "a") == 5
    assert max(count for row, count in counted.items() if row[0] == "a") == 1
    assert sorted(count for row, count in counted.items() if row[0] == "b") == [2, 3, 3, 3]


def test_the_seed_decides() -> None:
    sources = [list(range(50)), list(range(100, 150))]
    assert mix(sources, [20, 30], seed=1) == mix(sources, [20, 30], seed=1)
    assert mix(sources, [20, 30], seed=1) != mix(sources, [20, 30], seed=2)
    # Mixed: neither source comes first.
    places = [row < 100 for row in mix(sources, [25, 25], seed=0)]
    assert 5 < sum(places[:25]) < 20


def test_the_average_of_interleaving_as_datasets_does_it() -> None:
    """`datasets.interleave_datasets` draws until the first source is used up."""
    datasets = pytest.importorskip("datasets")
    sizes, weights = [30, 60], [0.6, 0.4]
    sources = [datasets.Dataset.from_dict({"x": [i] * size}) for i, size in enumerate(sizes)]
    drawn: Counter[int] = Counter()
    for seed in range(20):
        mixed = datasets.interleave_datasets(
            sources, weights, seed=seed, stopping_strategy="first_exhausted"
        )
        drawn.update(mixed["x"])
    counts = shares(sizes, weights)
    assert counts == [30, 20]
    for source, count in enumerate(counts):
        assert abs(drawn[source] / 20 - count) < 3

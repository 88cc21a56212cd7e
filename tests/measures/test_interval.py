"""The bootstrap against a plain one, and against what theory says of a mean."""

import math
import random

import numpy as np
import pytest

from esft.measures.interval import Interval, mean_interval, sums_interval


def plain_bootstrap(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """Without NumPy: draw as many with replacement, take the 2.5 % and the 97.5 % of the means."""
    generator = random.Random(5)
    means = sorted(
        sum(generator.choices(values, k=len(values))) / len(values) for _ in range(draws)
    )
    return means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def test_the_mean_of_zeros_and_ones() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = mean_interval(values)
    assert found.value == pytest.approx(0.3)
    low, high = plain_bootstrap(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.011)  # one row of 100
    # The normal approximation: 1.96 sqrt(p (1 - p) / n) = 0.0898.
    wide = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert (found.high - found.low) / 2 == pytest.approx(wide, abs=0.011)


def test_numbers_of_any_size() -> None:
    values = [1 / (1 + n % 13) for n in range(60)]
    found = mean_interval(values)
    assert found.value == pytest.approx(sum(values) / 60)
    low, high = plain_bootstrap(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_a_figure_of_sums_is_that_of_each_draw() -> None:
    """A ratio of sums is no mean of ratios; every draw must give the ratio of its own sums."""
    rows = [[n % 5, 5.0 + n % 3] for n in range(40)]
    found = sums_interval(rows, lambda sums: float(sums[0] / sums[1]))
    assert found.value == pytest.approx(sum(a for a, _ in rows) / sum(b for _, b in rows))
    generator = random.Random(2)
    ratios = []
    for _ in range(4000):
        drawn = generator.choices(rows, k=40)
        ratios.append(sum(a for a, _ in drawn) / sum(b for _, b in drawn))
    ratios.sort()
    assert (found.low, found.high) == pytest.approx((ratios[100], ratios[3899]), abs=0.01)


def test_it_is_seeded_and_leaves_other_generators_alone() -> None:
    values = [0.1 * (n % 7) for n in range(25)]
    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rows_that_are_all_alike_leave_no_room(value: float) -> None:
    assert mean_interval([value] * 9) == Interval(value, value, value)


def test_more_rows_than_are_counted_at_once() -> None:
    values = [float(n % 2) for n in range(5000)]  # 839 draws at a time
    found = mean_interval(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 5000), rel=0.1)

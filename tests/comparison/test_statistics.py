"""Means, spreads, Student's t and paired differences, against textbooks and plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esft.comparison.statistics import Difference, Summary, paired, t_quantile
from esft.errors import EsftError

_VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)],
)
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("degrees", "confidence"), [(1, 0.5), (2, 0.99), (5, 0.9), (8, 0.95)])
def test_students_density_between_the_quantiles_adds_up(degrees: int, confidence: float) -> None:
    """The integral of the density, by the midpoint rule, is the probability asked for."""
    t = t_quantile(degrees, confidence)
    factor = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    width = 2 * t / 20_000
    places = (-t + (n + 0.5) * width for n in range(20_000))
    total = sum(factor * (1 + x * x / degrees) ** (-(degrees + 1) / 2) * width for x in places)
    assert total == pytest.approx(confidence, abs=1e-6)


def test_three_pairs_exceed_their_spread_by_chance_as_often_as_is_said() -> None:
    """The module says 23 in 100: the |t| that 77.46 % stay below is the square root of 3."""
    assert t_quantile(2, math.sqrt(3 / 5)) == pytest.approx(math.sqrt(3))
    assert 1 - math.sqrt(3 / 5) == pytest.approx(0.23, abs=0.005)
    assert t_quantile(2) / math.sqrt(3) == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize(("degrees", "confidence"), [(0, 0.95), (2, 0.0), (2, 1.0)])
def test_no_quantile_out_of_range(degrees: int, confidence: float) -> None:
    with pytest.raises(EsftError, match="no quantile"):
        t_quantile(degrees, confidence)


@given(_VALUES)
def test_a_summary_is_that_of_the_standard_library(values: list[float]) -> None:
    found = Summary.of(values)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.spread == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert found.count == len(values)


def test_a_single_value_has_no_spread() -> None:
    assert Summary.of([0.5]) == Summary(0.5, None, 1)
    assert Difference.of([0.5]) == Difference(0.5, None, None, None, 1)
    assert Difference.of([0.5]).exceeds_spread is None


def test_no_value_has_no_mean() -> None:
    with pytest.raises(EsftError, match="no value"):
        Summary.of([])


def test_pairs_are_runs_with_the_same_seed() -> None:
    """Differences 1, 2 and 3: mean 2, spread 1, 2 +- 4.303 / sqrt(3)."""
    found = paired({0: 2.0, 1: 4.0, 2: 6.0, 7: 99.0}, {2: 3.0, 1: 2.0, 0: 1.0, 8: 99.0})
    assert found is not None
    assert (found.mean, found.spread, found.pairs) == (2.0, 1.0, 3)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.exceeds_spread
    assert not found.exceeds(1.5)
    assert not found.exceeds(3.0)  # as far as the spread is not further
    assert found.exceeds(3.1)


def test_no_common_seed_is_no_pair() -> None:
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({}, {}) is None


@given(_VALUES, st.floats(-5, 5), st.integers(0, 5))
def test_what_all_runs_of_a_seed_share_does_not_widen_the_spread(
    values: list[float], shift: float, scale: int
) -> None:
    """A seed that is hard for both methods alike: pairing takes it out."""
    other = {seed: scale * value for seed, value in enumerate(values)}
    found = paired({seed: value + shift for seed, value in other.items()}, other)
    assert found is not None
    assert found.mean == pytest.approx(shift, abs=1e-9)
    assert found.spread == pytest.approx(0.0, abs=1e-9)


@given(_VALUES)
def test_the_other_way_round_is_the_negative(values: list[float]) -> None:
    one, zero = dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)
    there, back = paired(one, zero), paired(zero, one)
    assert there is not None
    assert back is not None
    assert there.mean == -back.mean
    assert there.spread == back.spread
    assert there.low == pytest.approx(-back.high)  # type: ignore[operator]
    assert there.exceeds_spread == back.exceeds_spread

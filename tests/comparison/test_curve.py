"""What a run has forgotten at equal score, against examples by hand and a slow walk along it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from run_records import compared, run

from esft.comparison.curve import Curve, curve

# Scores in steps of 1/64, so that differences and halves are exact.
_SCORES = st.integers(0, 64).map(lambda n: n / 64)
_CURVES = st.lists(st.tuples(_SCORES, st.floats(-1, 1)), min_size=1, max_size=8).map(
    lambda pairs: Curve(tuple(score for score, _ in pairs), tuple(lost for _, lost in pairs))
)


def test_a_curve_by_hand() -> None:
    """0 -> 0.4 -> 0.2 -> 0.8: the second fall back to 0.2 costs 0.3 before 0.4 is seen again."""
    found = Curve((0.0, 0.4, 0.2, 0.8), (0.0, 0.1, 0.4, 0.7))
    assert (found.start, found.best) == (0.0, 0.8)
    assert found.at(0.2) == pytest.approx(0.05)
    assert found.at(0.4) == pytest.approx(0.1)  # at first, not when it came back
    assert found.at(0.5) == pytest.approx(0.4 + 0.3 * (0.3 / 0.6))
    assert found.at(0.8) == pytest.approx(0.7)
    assert found.at(0.81) is None
    assert found.at(-1.0) == 0.0
    # 0 to 0.4: triangle of 0.02; 0.4 to 0.8: from 0.5 (on the way from 0.2) to 0.7, 0.6 * 0.4.
    assert found.mean(0.0, 0.8) == pytest.approx((0.02 + 0.24) / 0.8)
    assert found.mean(0.0, 0.4) == pytest.approx(0.05)
    assert found.mean(0.4, 0.8) == pytest.approx(0.6)
    assert found.mean(-0.4, 0.4) == pytest.approx(0.025)  # below the start it is the start's
    assert found.mean(0.0, 0.9) is None
    assert found.mean(0.4, 0.4) is None


def test_a_run_that_never_learns_has_a_curve_of_one_score() -> None:
    found = Curve((0.0, 0.0, 0.0), (0.0, 0.5, 1.0))
    assert found.at(0.0) == 0.0
    assert found.at(0.01) is None
    assert found.mean(0.0, 0.01) is None


@settings(max_examples=25)
@given(_CURVES, st.floats(0.01, 1))
def test_the_mean_is_that_of_many_scores_between(found: Curve, share: float) -> None:
    """A midpoint rule over `at`, which jumps at most as often as the score rises again."""
    low = found.start
    high = low + share * (found.best - low)
    assume(high - low > 1e-3)
    count = 4000
    places = (low + (n + 0.5) * (high - low) / count for n in range(count))
    values = [found.at(place) for place in places]
    assert None not in values
    expected = sum(value for value in values if value is not None) / count
    # Each of at most 8 jumps, of at most 2 nats, may fall anywhere within one interval.
    assert found.mean(low, high) == pytest.approx(expected, abs=8 * 2 / count)


@given(_CURVES, st.floats(0, 1))
def test_at_is_what_a_walk_along_the_run_meets_first(found: Curve, share: float) -> None:
    score = found.start + share * (found.best - found.start)
    met = found.forgotten[0] if found.start >= score else None
    for place in range(len(found.scores) - 1):
        left, right = found.scores[place : place + 2]
        if met is None and right >= score:
            part = (score - left) / (right - left)
            met = found.forgotten[place] + part * (
                found.forgotten[place + 1] - found.forgotten[place]
            )
    assert found.at(score) == pytest.approx(met, abs=1e-9)


@given(st.lists(_SCORES, min_size=2, max_size=8), st.floats(-1, 1))
def test_a_constant_curve_has_its_constant_as_mean(scores: list[float], lost: float) -> None:
    found = Curve(tuple(scores), (lost,) * len(scores))
    assume(found.best > found.start)
    assert found.mean(found.start, found.best) == pytest.approx(lost, abs=1e-12)


@given(_CURVES, st.data())
def test_more_evaluations_of_the_same_run_change_nothing(found: Curve, data: st.DataObject) -> None:
    """How fast the run was, and how often it was looked at, is not in a curve."""
    assume(found.best > found.start)
    place = data.draw(st.integers(1, len(found.scores) - 1))
    half = [(pair[0] + pair[1]) / 2 for pair in _neighbours(found, place)]
    finer = Curve(
        (*found.scores[:place], half[0], *found.scores[place:]),
        (*found.forgotten[:place], half[1], *found.forgotten[place:]),
    )
    ends = found.start, found.best
    assert finer.mean(*ends) == pytest.approx(found.mean(*ends), abs=1e-9)
    assert finer.at(sum(ends) / 2) == pytest.approx(found.at(sum(ends) / 2), abs=1e-9)


@given(_CURVES, st.floats(0, 1))
def test_who_forgets_more_everywhere_forgets_more_on_average(found: Curve, more: float) -> None:
    assume(found.best > found.start)
    worse = Curve(found.scores, tuple(lost + more for lost in found.forgotten))
    ends = found.start, found.best
    first, second = found.mean(*ends), worse.mean(*ends)
    assert first is not None
    assert second == pytest.approx(first + more, abs=1e-9)


def test_a_records_curve_is_its_validation_score_and_its_loss_above_the_bases() -> None:
    record = run(score=1.0, forgotten=9.0, curve=[(0.0, 0.0), (0.5, 0.25)])
    found = curve(compared(record), record)
    assert found is not None
    assert found.scores == (0.0, 0.5)
    assert found.forgotten == pytest.approx((0.0, 0.25))


def test_no_curve_without_evaluations_or_general_loss() -> None:
    never, record = run(), run(curve=[(0.0, 0.0), (0.5, 0.25)])
    assert curve(compared(never), never) is None
    assert curve(compared(record, base={}), record) is None
    record.points[0].general.clear()
    record.points[1].general.clear()
    assert curve(compared(record), record) is None


def _neighbours(found: Curve, place: int) -> list[tuple[float, float]]:
    return [(values[place - 1], values[place]) for values in (found.scores, found.forgotten)]

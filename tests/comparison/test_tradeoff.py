"""Methods at equal score: the range, its levels, and gaps between pairs, by hand."""

from __future__ import annotations

import pytest
from run_records import compared, run

from esft.comparison import tradeoff
from esft.comparison.curve import Curve
from esft.comparison.figures import by_seed
from esft.comparison.records import RunRecord

# Straight lines: what is forgotten is a fixed part of the score.
FAST = [(0.0, 0.0), (0.5, 0.05), (1.0, 0.1)]  # a tenth
SLOW = [(0.0, 0.0), (0.4, 0.08), (0.8, 0.16)]  # a fifth
STUCK = [(0.0, 0.0), (0.2, 0.1), (0.3, 0.15)]  # a half, and does not learn the task


def _runs(method: str, curve: list[tuple[float, float]], **options: object) -> list[RunRecord]:
    return [run(method, seed, curve=curve, **options) for seed in (0, 1)]  # type: ignore[arg-type]


def test_the_range_is_what_every_method_reaches_that_learns_the_task() -> None:
    comparison = compared(*_runs("full", FAST), *_runs("lora", SLOW), *_runs("random", STUCK))
    found = tradeoff.task_range(comparison, "dates")
    assert found == tradeoff.ScoreRange(0.0, 0.8, ("random",))
    assert found.level(0.5) == 0.4
    assert tradeoff.task_ranges(comparison) == {"dates": found}


def test_the_weakest_run_of_a_method_counts_for_it() -> None:
    fast, slow = (Curve((0.1, end), (0.0, 1.0)) for end in (0.9, 0.6))
    weak = Curve((0.1, 0.45), (0.0, 1.0))
    assert tradeoff.score_range({"a": [fast], "b": [fast, slow], "c": []}) == (
        tradeoff.ScoreRange(0.1, 0.6, ())
    )
    # Half of the way from 0.1 to 0.9 is 0.5.
    assert tradeoff.score_range({"a": [fast], "b": [fast, weak]}) == (
        tradeoff.ScoreRange(0.1, 0.9, ("b",))
    )


def test_the_range_begins_where_the_last_one_starts() -> None:
    one, other = Curve((0.0, 0.9), (0.0, 1.0)), Curve((0.2, 0.8), (0.0, 1.0))
    assert tradeoff.score_range({"a": [one], "b": [other]}) == tradeoff.ScoreRange(0.2, 0.8, ())


def test_no_range_without_a_run_that_learnt_something() -> None:
    flat = Curve((0.2, 0.1), (0.0, 1.0))
    # A method with a good and a bad seed: there is no score that all runs of any method reach.
    good = Curve((0.2, 0.9), (0.0, 1.0))
    assert tradeoff.score_range({}) is None
    assert tradeoff.score_range({"a": []}) is None
    assert tradeoff.score_range({"a": [flat]}) is None
    assert tradeoff.score_range({"a": [flat, good]}) is None


def test_figures_at_equal_score() -> None:
    comparison = compared(
        *_runs("full", FAST, forgotten=0.1),
        *_runs("lora", SLOW, forgotten=0.16),
        *_runs("random", STUCK, forgotten=0.15),
        run("hot-lora"),  # never evaluated
    )

    def values(figure: tradeoff.Figure) -> dict[str, float]:
        return {
            method: seeds[0]
            for method in comparison.methods
            if (seeds := by_seed(comparison, method, figure, ["dates"]))
        }

    # The range is 0 to 0.8: half of it is a score of 0.4.
    assert values(tradeoff.forgotten_at(comparison, 0.5)) == pytest.approx(
        {"full": 0.04, "lora": 0.08}
    )
    assert values(tradeoff.forgotten_at(comparison, 0.25)) == pytest.approx(
        {"full": 0.02, "lora": 0.04, "random": 0.1}
    )
    assert values(tradeoff.forgotten_on_average(comparison)) == pytest.approx(
        {"full": 0.04, "lora": 0.08}
    )
    assert values(tradeoff.forgotten_at_end(comparison)) == pytest.approx(
        {"full": 0.1, "lora": 0.16, "random": 0.15, "hot-lora": 0.0}
    )


def test_the_gap_of_a_pair_is_over_what_both_reach_whatever_others_do() -> None:
    comparison = compared(
        run("esft-token", 0, curve=FAST),
        run("esft-token", 1, curve=FAST),
        run("lora", 0, curve=SLOW),  # both reach 0.8: 0.04 against 0.08
        run("lora", 1, curve=STUCK),  # both reach 0.3: 0.015 against 0.075
        run("lora", 2, curve=SLOW),  # no pair
        *_runs("random", STUCK),
    )
    found = tradeoff.gap(comparison, "esft-token", "lora", ["dates"])
    assert found is not None
    assert found.mean == pytest.approx((-0.04 - 0.06) / 2)
    assert found.pairs == 2
    back = tradeoff.gap(comparison, "lora", "esft-token", ["dates"])
    assert back is not None
    assert back.mean == pytest.approx(-found.mean)


def test_a_gap_over_several_tasks_takes_seeds_that_have_them_all() -> None:
    comparison = compared(
        *_runs("full", FAST),
        *_runs("lora", SLOW),
        run("full", 0, curve=FAST, task="json"),
        run("full", 1, curve=FAST, task="json", failed=True),
        *_runs("lora", FAST, task="json"),
    )
    found = tradeoff.gap(comparison, "full", "lora", ["dates", "json"])
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx((-0.04 + 0.0) / 2), 1)


def test_no_gap_without_curves() -> None:
    comparison = compared(run("full"), run("lora", curve=SLOW), run("random", curve=[(0.0, 0.0)]))
    assert tradeoff.gap(comparison, "full", "lora", ["dates"]) is None
    assert tradeoff.gap(comparison, "random", "lora", ["dates"]) is None

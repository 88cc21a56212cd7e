"""The learning rate that validation rows choose."""

from __future__ import annotations

import pytest
from run_records import run

from esft.comparison.learning_rates import choose_learning_rate
from esft.comparison.records import RunRecord
from esft.errors import EsftError


def _run(rate: float, seed: int, last: float, *, loss: float = 1.0, **options: bool) -> RunRecord:
    """Return a run that passes 0.99 on its way, ends at `last`, and is perfect on the test rows."""
    curve = [(0.0, 0.0), (0.99, 0.0), (last, 5.0)]
    return run(seed=seed, score=1 - last, rate=rate, curve=curve, loss=loss, **options)


def test_the_highest_mean_of_the_last_evaluations_wins() -> None:
    """Not the best evaluation, not the test rows, not one lucky seed."""
    records = [
        _run(1e-3, 0, 0.95),
        _run(1e-3, 1, 0.50),
        _run(1e-4, 0, 0.80),
        _run(1e-4, 1, 0.80),
        _run(1e-5, 0, 0.10),
        _run(1e-5, 1, 0.10),
    ]
    assert choose_learning_rate(records) == 1e-4
    assert choose_learning_rate(reversed(records)) == 1e-4


def test_equal_scores_are_told_apart_by_loss_then_by_rate() -> None:
    records = [_run(1e-5, 0, 0.9, loss=0.3), _run(1e-4, 0, 0.9, loss=0.2)]
    assert choose_learning_rate(records) == 1e-4
    assert choose_learning_rate([*records, _run(1e-3, 0, 0.9, loss=0.2)]) == 1e-4


def test_a_rate_at_which_a_run_failed_is_taken_only_if_all_have_one() -> None:
    fails = [_run(1e-3, 0, 0.99), _run(1e-3, 1, 0.99, failed=True)]
    assert choose_learning_rate([*fails, _run(1e-4, 0, 0.2), _run(1e-4, 1, 0.2)]) == 1e-4
    assert choose_learning_rate([*fails, _run(1e-4, 0, 0.2), _run(1e-4, 1, 0.2, failed=True)]) == (
        1e-3
    )


def test_the_first_metric_counts_unless_another_is_named() -> None:
    one, other = (
        run(rate=rate, curve=[(score, 0.0)]) for rate, score in ((1e-4, 0.4), (1e-3, 0.5))
    )
    one.points[0].scores["chrf"] = 0.9
    other.points[0].scores["chrf"] = 0.1
    assert choose_learning_rate([one, other]) == 1e-3
    assert choose_learning_rate([one, other], "chrf") == 1e-4
    with pytest.raises(
        EsftError, match=r"runs/dates/full/lr-0\.0001/seed-0: .* no score called bleu"
    ):
        choose_learning_rate([one, other], "bleu")


@pytest.mark.parametrize("records", [[], [run(failed=True, curve=[(1.0, 0.0)])], [run()]])
def test_without_an_evaluation_there_is_no_choice(records: list[RunRecord]) -> None:
    with pytest.raises(EsftError, match="no learning rate can be chosen"):
        choose_learning_rate(records)


def test_of_rates_as_good_as_the_best_within_a_tolerance_the_lowest_is_taken() -> None:
    runs = [_run(1e-4, 0, 0.90), _run(1e-3, 0, 0.93), _run(1e-2, 0, 0.94)]
    assert choose_learning_rate(runs) == 1e-2
    assert choose_learning_rate(runs, tolerance=0.02) == 1e-3
    assert choose_learning_rate(runs, tolerance=0.05) == 1e-4

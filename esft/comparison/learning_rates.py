"""The learning rate of a method: the one whose runs answer the validation rows best."""

from __future__ import annotations

from collections.abc import Iterable

from esft.comparison.records import RunRecord
from esft.comparison.statistics import Summary
from esft.errors import EsftError


def choose_learning_rate(
    records: Iterable[RunRecord], metric: str | None = None, tolerance: float = 0.0
) -> float:
    """Return the learning rate with the highest mean score on the validation rows.

    A run's score is that of its last evaluation. Equal scores are told apart by the lower mean
    validation loss, and equal losses by the lower rate. What was forgotten has no say: held-out
    text is for reporting, not for choosing. A rate with a run that failed, or was never
    evaluated, is taken only if there is one at every rate; then the rates with the fewest such
    runs are compared.

    Args:
        records: of one method on one task (or on several), at all its rates and seeds.
        metric: the score; None takes the first one of each evaluation.
        tolerance: scores that are at most this far below the best one count as good as it, and the
            lowest of their rates is taken: a higher one forgets more for next to nothing.

    Raises:
        EsftError: no run was evaluated, or not by this metric.
    """
    rates: dict[float, list[RunRecord]] = {}
    for record in records:
        rates.setdefault(record.learning_rate, []).append(record)
    ranked = [
        (*rank, rate) for rate, runs in rates.items() if (rank := _rank(runs, metric)) is not None
    ]
    if not ranked:
        names = sorted({record.folder for runs in rates.values() for record in runs})
        raise EsftError(
            f"no learning rate can be chosen: no run was scored on validation rows "
            f"({', '.join(names) or 'there are no runs'})"
        )
    failed, best, *_ = min(ranked)
    if not tolerance:
        return min(ranked)[-1]
    return min(rank[-1] for rank in ranked if rank[0] == failed and rank[1] <= best + tolerance)


def _rank(runs: list[RunRecord], metric: str | None) -> tuple[int, float, float] | None:
    """Return what rates are sorted by, lowest first; None if no run has an evaluation."""
    last = [run.points[-1] for run in runs if run.outcome is not None and run.points]
    if not last:
        return None
    scores = []
    for point in last:
        name = next(iter(point.scores), None) if metric is None else metric
        if name not in point.scores:
            raise EsftError(f"{runs[0].folder}: its evaluations have no score called {name}")
        scores.append(point.scores[name])
    losses = [point.loss for point in last]
    return len(runs) - len(last), -Summary.of(scores).mean, Summary.of(losses).mean

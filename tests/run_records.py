"""Comparisons written out by hand, run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esft.comparison.records import Comparison, Interval, Outcome, Point, RunRecord

BASE_LOSS = 1.0  # general loss of the untrained model, nats a token


def point(step: int, score: float, forgotten: float, loss: float = 1.0) -> Point:
    """Return an evaluation whose general loss is `forgotten` above the base's, in two domains."""
    general = {"prose": BASE_LOSS + forgotten - 0.25, "code": BASE_LOSS + forgotten + 0.25}
    return Point(step, float(step), {"exact_match": score}, loss, general)


def run(
    method: str = "full",
    seed: int = 0,
    score: float = 0.5,
    forgotten: float = 0.0,
    *,
    task: str = "dates",
    curve: Sequence[tuple[float, float]] = (),
    rate: float = 1e-4,
    loss: float = 1.0,
    trained: int = 100,
    chosen: bool = True,
    sweep: Mapping[str, float] | None = None,
    failed: bool = False,
) -> RunRecord:
    """Return a run's record.

    Args:
        score: on the test rows.
        forgotten: general loss above the base's in the end.
        curve: (score, forgotten) of each evaluation.
        loss: validation loss of the last evaluation, and test loss.
        failed: whether it has no outcome.
    """
    points = [point(10 * n, *pair, loss=loss) for n, pair in enumerate(curve)]
    outcome = Outcome(
        scores={"exact_match": Interval(score, score, score)},
        loss=loss,
        general=point(0, score, forgotten).general,
        trained=trained,
        total=1000,
        delta_bytes=2 * trained,
        steps=10,
        seconds=4.0,
        step_seconds=0.4,
        tokens_per_second=1000.0,
        peak_memory=5000,
        flops=6e9,
    )
    return RunRecord(
        task=task,
        method=method,
        learning_rate=rate,
        seed=seed,
        folder=f"runs/{task}/{method}/lr-{rate:g}/seed-{seed}",
        sweep=dict(sweep or {}),
        chosen=chosen,
        points=points,
        outcome=None if failed else outcome,
        error="it failed" if failed else None,
    )


def compared(*records: RunRecord, **fields: Any) -> Comparison:
    """Return a comparison of some runs: its tasks, methods and seeds are theirs."""
    given: dict[str, Any] = {
        "model": "tiny-moe",
        "tasks": list(dict.fromkeys(record.task for record in records)),
        "methods": list(dict.fromkeys(record.method for record in records)),
        "seeds": sorted({record.seed for record in records}),
        "metric": "exact_match",
        "base": {record.task: point(0, 0.0, 0.0) for record in records},
        "records": list(records),
        "recipe": {},
        "versions": {},
    }
    return Comparison(**{**given, **fields})

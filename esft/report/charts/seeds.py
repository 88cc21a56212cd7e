"""What pictures show of several seeds: each one's own series, and their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from esft.comparison.records import Comparison, Point, RunRecord

Series = dict[int, tuple[float, ...]]  # step -> what was read at it


def runs_by_method(comparison: Comparison, task: str) -> dict[str, list[RunRecord]]:
    """Return the runs that count, by method; a method without one is left out."""
    found = {method: comparison.of(task, method) for method in comparison.methods}
    return {method: runs for method, runs in found.items() if runs}


def series(
    runs: Sequence[RunRecord], read: Callable[[Point], tuple[float, ...] | None]
) -> dict[int, Series]:
    """Return by seed what was read at each evaluation, in the order of steps.

    Args:
        runs: one a seed.
        read: takes numbers from a point; None where it lacks one, which leaves the point out.
    """
    found = {}
    for run in runs:
        values = {point.step: read(point) for point in run.points}
        known = {step: value for step, value in sorted(values.items()) if value is not None}
        if known:
            found[run.seed] = known
    return found


def mean_series(by_seed: Mapping[int, Series]) -> Series:
    """Return the mean over seeds at each step that all of them have.

    A mean over fewer seeds would jump where one of them stops.
    """
    if not by_seed:
        return {}
    several = list(by_seed.values())
    steps = [step for step in several[0] if all(step in one for one in several)]
    return {
        step: tuple(
            math.fsum(values) / len(values)
            for values in zip(*(one[step] for one in several), strict=True)
        )
        for step in steps
    }


def score_and_general(metric: str) -> Callable[[Point], tuple[float, ...] | None]:
    """Return what reads a point's score and general loss."""
    return lambda point: (
        (point.scores[metric], point.general_loss)
        if metric in point.scores and point.general
        else None
    )


def left_out(comparison: Comparison, task: str, *, all_rates: bool = False) -> str:
    """Return a sentence on the methods that have no run to show, and on runs that failed.

    Args:
        comparison: has the runs.
        task: its name.
        all_rates: whether the picture shows all learning rates, not only the chosen ones.
    """
    told = []
    for method in comparison.methods:
        planned = [
            record
            for record in comparison.records
            if (record.task, record.method) == (task, method) and not record.sweep
        ]
        ended = [record for record in planned if record.outcome is not None]
        shown = ended if all_rates else comparison.of(task, method)
        failed = sum(record.error is not None for record in planned)
        open_ = sum(record.outcome is None and record.error is None for record in planned)
        if planned and not shown:
            why = f"{failed} failed" if failed else "not finished"
            told.append(f"{method} (no run to show: {why})")
        elif failed or open_:
            counts = [f"{failed} failed"] * bool(failed) + [f"{open_} not finished"] * bool(open_)
            told.append(f"{method} (of {len(planned)} runs {', '.join(counts)})")
    return f" Incomplete: {'; '.join(told)}." if told else ""


def seeds_note(by_method: Mapping[str, Sequence[RunRecord]]) -> str:
    """Return what lines are: of one seed, or the mean over several."""
    counts = {len(runs) for runs in by_method.values()}
    if counts <= {1}:
        return "One run a method."
    most = max(counts)
    number = f"{most}" if len(counts) == 1 else f"up to {most}"
    return f"Full lines: mean over {number} seeds; thin lines: the seeds."

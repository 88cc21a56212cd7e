"""The figures that runs are compared by: what is read from a run, in which unit, which way is good.

Over several tasks a figure is averaged within a seed first, so that its spread is that of the
seeds for these tasks, not that of easy and hard tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from esft.comparison.records import Comparison, Outcome, Point, RunRecord

Unit = Literal[
    "score", "nats", "parameters", "percent", "bytes", "seconds", "tokens/s", "FLOPs", "steps"
]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Figure:
    """One figure of a run.

    Attributes:
        key: its name in JSON.
        title: above its column.
        unit: of it.
        better: which way is good.
        read: takes it from a run that ended; None where the run has none.
        read_base: takes it from the untrained model; None where that has none.
    """

    key: str
    title: str
    unit: Unit
    better: Better
    read: Callable[[RunRecord], float | None]
    read_base: Callable[[Point], float | None] = lambda _: None


def by_seed(
    comparison: Comparison, method: str, figure: Figure, tasks: Iterable[str]
) -> dict[int, float]:
    """Return a figure of a method's runs by seed, as the mean over some tasks.

    Only seeds whose runs give the figure on every one of the tasks are there: a mean over fewer
    tasks could not be compared with one over all.
    """
    found: dict[int, list[float]] = {}
    names = list(tasks)
    for task in names:
        for record in comparison.of(task, method):
            value = figure.read(record)
            if value is not None:
                found.setdefault(record.seed, []).append(value)
    return {
        seed: sum(values) / len(values)
        for seed, values in found.items()
        if len(values) == len(names)
    }


def of_base(comparison: Comparison, figure: Figure, tasks: Iterable[str]) -> float | None:
    """Return a figure of the untrained model, as the mean over some tasks; None if one lacks it."""
    values = [
        figure.read_base(comparison.base[task]) if task in comparison.base else None
        for task in tasks
    ]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def score(metric: str) -> Figure:
    """Return the score on a task's test rows, by some metric."""
    return Figure(
        key=metric,
        title=metric.replace("_", " "),
        unit="score",
        better="higher",
        read=lambda record: (
            record.outcome.scores[metric].value
            if record.outcome and metric in record.outcome.scores
            else None
        ),
        read_base=lambda point: point.scores.get(metric),
    )


def task_loss() -> Figure:
    """Return the loss on a task's test rows."""
    return _of_outcome("loss", "test loss", "nats", "lower", lambda o: o.loss, lambda p: p.loss)


def general(domain: str) -> Figure:
    """Return the held-out loss of a domain."""
    return _of_outcome(
        f"general_{domain}",
        domain,
        "nats",
        "lower",
        lambda outcome: outcome.general.get(domain),
        lambda point: point.general.get(domain),
    )


def general_average() -> Figure:
    """Return the mean held-out loss over the domains."""
    return _of_outcome(
        "general",
        "average",
        "nats",
        "lower",
        lambda outcome: outcome.general_loss if outcome.general else None,
        lambda point: point.general_loss if point.general else None,
    )


def costs() -> list[Figure]:
    """Return what a run costs: what trains and is saved, time, memory, operations."""
    return [
        _of_outcome("trained", "trained", "parameters", "lower", lambda o: o.trained),
        _of_outcome("share", "of the model", "percent", "lower", lambda o: o.trained / o.total),
        _of_outcome("bytes", "saved", "bytes", "lower", lambda o: o.delta_bytes),
        _of_outcome("step_seconds", "a step", "seconds", "lower", lambda o: o.step_seconds),
        _of_outcome("seconds", "in total", "seconds", "lower", lambda o: o.seconds),
        _of_outcome("speed", "speed", "tokens/s", "higher", lambda o: o.tokens_per_second),
        _of_outcome("memory", "peak memory", "bytes", "lower", lambda o: o.peak_memory),
        _of_outcome("flops", "operations", "FLOPs", "lower", lambda o: o.flops),
    ]


def domains(comparison: Comparison) -> list[str]:
    """Return the domains of held-out text that the base was scored on, in order of appearance."""
    names = dict.fromkeys(name for point in comparison.base.values() for name in point.general)
    return list(names)


def _of_outcome(
    key: str,
    title: str,
    unit: Unit,
    better: Better,
    read: Callable[[Outcome], float | None],
    read_base: Callable[[Point], float | None] = lambda _: None,
) -> Figure:
    return Figure(
        key=key,
        title=title,
        unit=unit,
        better=better,
        read=lambda record: None if record.outcome is None else read(record.outcome),
        read_base=read_base,
    )

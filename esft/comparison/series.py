"""What a sweep found: a figure against the value of the key that was swept."""

from __future__ import annotations

from dataclasses import dataclass

from esft.comparison import figures
from esft.comparison.figures import Figure
from esft.comparison.records import Comparison, RunRecord
from esft.comparison.statistics import Summary
from esft.comparison.table import Cell, Column, Row, Table


@dataclass(frozen=True)
class SweptValue:
    """The runs at one value of a swept key, over their seeds.

    Attributes:
        value: of the key.
        score: on the test rows.
        general: held-out loss, in nats a token; None if none was measured.
        trained: parameters that train.
    """

    value: float
    score: Summary
    general: Summary | None
    trained: Summary


@dataclass(frozen=True)
class SweepSeries:
    """One method's runs on one task along a sweep.

    Attributes:
        key: what was swept, such as `p`.
        task: name of the task.
        method: name of the method.
        values: by ascending value; one whose runs all failed is not there.
    """

    key: str
    task: str
    method: str
    values: tuple[SweptValue, ...]


def sweep_series(comparison: Comparison) -> list[SweepSeries]:
    """Return the series of all sweeps: by key in order of appearance, then task, then method.

    Of runs at several learning rates those at the chosen one count, where one is chosen.
    """
    groups: dict[tuple[str, str, str], dict[float, list[RunRecord]]] = {}
    for record in comparison.records:
        for key, value in record.sweep.items():
            if record.outcome is not None and comparison.metric in record.outcome.scores:
                group = groups.setdefault((key, record.task, record.method), {})
                group.setdefault(value, []).append(record)
    keys = list(dict.fromkeys(key for record in comparison.records for key in record.sweep))
    return [
        SweepSeries(key, task, method, _values(comparison, groups[key, task, method]))
        for key in keys
        for task in comparison.tasks
        for method in comparison.methods
        if (key, task, method) in groups
    ]


def sweep_tables(comparison: Comparison) -> list[Table]:
    """Return a table for each swept key and task: its values down, what came of them across."""
    score, general = figures.score(comparison.metric), figures.general_average()
    columns = (
        Column(score.key, "", score.title, score.unit, score.better),
        Column(general.key, "", "general loss", general.unit, general.better),
        Column("trained", "", "trained", "parameters"),
    )
    series = sweep_series(comparison)
    return [
        Table(
            key=f"sweep-{key}-{task}",
            title=f"{task}: what {key} does",
            columns=columns,
            rows=tuple(
                Row(
                    f"{line.method}, {key} {found.value:g}",
                    tuple(map(_cell, (found.score, found.general, found.trained))),
                )
                for line in series
                if (line.key, line.task) == (key, task)
                for found in line.values
            ),
            notes=("Mean ± spread over seeds (the standard deviation with n − 1).",),
        )
        for key, task in dict.fromkeys((line.key, line.task) for line in series)
    ]


def _cell(summary: Summary | None) -> Cell:
    return Cell() if summary is None else Cell(summary.mean, summary.spread, summary.count)


def _values(
    comparison: Comparison, records: dict[float, list[RunRecord]]
) -> tuple[SweptValue, ...]:
    trained = next(figure for figure in figures.costs() if figure.key == "trained")
    found = []
    for value, runs in sorted(records.items()):
        chosen = [run for run in runs if run.chosen] or runs
        score = _summary(figures.score(comparison.metric), chosen)
        size = _summary(trained, chosen)
        if score is None or size is None:  # never: these runs have ended, and were scored
            continue
        found.append(SweptValue(value, score, _summary(figures.general_average(), chosen), size))
    return tuple(found)


def _summary(figure: Figure, runs: list[RunRecord]) -> Summary | None:
    values = [value for run in runs if (value := figure.read(run)) is not None]
    return Summary.of(values) if values else None

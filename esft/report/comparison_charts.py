"""The pictures of a comparison, in groups as its report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from esft.comparison.records import Comparison
from esft.comparison.roles import is_esft
from esft.overlap import shared
from esft.report.chart import Chart
from esft.report.charts.ends import general_against_score, score_against_bytes
from esft.report.charts.experts import experts_per_layer
from esft.report.charts.logged import training_losses
from esft.report.charts.overlaps import overlap_map
from esft.report.charts.progress import (
    general_loss,
    score_over_steps,
    training_loss,
    validation_loss,
)
from esft.report.charts.routing import routing_of_methods
from esft.report.charts.sweeps import learning_rates, sweep, swept_keys
from esft.report.charts.tradeoff import tradeoff
from esft.report.run_charts import changed_routing, chosen_experts


def tradeoffs(comparison: Comparison) -> list[Chart]:
    """Return what is forgotten against what is learnt, a picture a task."""
    return _drawn(tradeoff(comparison, task) for task in comparison.tasks)


def results(comparison: Comparison) -> list[Chart]:
    """Return what is kept against what is learnt when training ends: over all tasks, and each."""
    return _drawn(general_against_score(comparison, place) for place in _places(comparison))


def costs(comparison: Comparison) -> list[Chart]:
    """Return the score against the bytes that are saved: over all tasks, and each."""
    return _drawn(score_against_bytes(comparison, place) for place in _places(comparison))


def sweeps(comparison: Comparison) -> list[Chart]:
    """Return what came of other values of a key, and of other learning rates, a picture a task."""
    swept = (
        sweep(comparison, task, k) for k in swept_keys(comparison) for task in comparison.tasks
    )
    return _drawn([*swept, *(learning_rates(comparison, task) for task in comparison.tasks)])


def learning(comparison: Comparison, task: str, folder: Path) -> list[Chart]:
    """Return a task's curves by step.

    Args:
        comparison: has the runs.
        task: its name.
        folder: of the comparison, which has the runs' logs.
    """
    return _drawn(
        (
            score_over_steps(comparison, task),
            general_loss(comparison, task),
            training_loss(comparison, task, training_losses(comparison, folder)),
            validation_loss(comparison, task),
        )
    )


def experts(comparison: Comparison, task: str, folder: Path) -> list[Chart]:
    """Return which experts a task's runs train: heat maps, how many a layer, how routing changed.

    Args:
        comparison: has the runs.
        task: its name.
        folder: of the comparison; heat maps need the scores in the folders of the first seed's
            runs.
    """
    maps: list[Chart | None] = []
    changes: list[Chart] = []
    for method in filter(is_esft, comparison.methods):
        if runs := comparison.of(task, method):
            run, of = folder / runs[0].folder, f"{task}, {method}"
            maps.append(chosen_experts(run, of))
            changes = changes or changed_routing(run, of)
    layers = experts_per_layer(comparison, task)
    return _drawn((*maps, layers, routing_of_methods(comparison, task), *changes))


def overlaps(comparison: Comparison) -> list[Chart]:
    """Return how many of the selected experts tasks share, by the first ESFT that all have."""
    for method in filter(is_esft, comparison.methods):
        chosen = {}
        for task in comparison.tasks:
            runs = comparison.of(task, method)
            if runs and runs[0].outcome and runs[0].outcome.selection:
                chosen[task] = runs[0].outcome.selection
        if len(chosen) == len(comparison.tasks) > 1:
            title = f"Experts that tasks share ({method})"
            return [overlap_map(shared(chosen), name="overlap", title=title)]
    return []


def _places(comparison: Comparison) -> list[str | None]:
    """Return the average of the tasks, and every task; of one task they are the same."""
    return [None, *comparison.tasks] if len(comparison.tasks) > 1 else [None]


def _drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]

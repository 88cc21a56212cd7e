"""What runs measured over their steps: score, validation loss, general loss, training loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esft.comparison.records import Comparison, Point
from esft.report.chart import Chart
from esft.report.charts.canvas import canvas, look, name_axis
from esft.report.charts.seeds import (
    Series,
    left_out,
    mean_series,
    runs_by_method,
    seeds_note,
    series,
)
from esft.report.charts.style import line_styles
from esft.report.charts.text import file_name, words

_MARKED = 12  # more evaluations than this get a line without markers


@dataclass(frozen=True)
class _Quantity:
    """What goes upwards.

    Attributes:
        key: in the name of the files and the CSV.
        title: in words.
        axis: with its unit, and which way is good.
        note: what was measured on what.
    """

    key: str
    title: str
    axis: str
    note: str


def score_over_steps(comparison: Comparison, task: str) -> Chart | None:
    """Draw the score on the validation rows at every evaluation; None if there is none."""
    metric = comparison.metric
    name = words(metric)
    quantity = _Quantity(
        metric, name, f"{name}  (↑ better)", f"{name} on the validation rows at every evaluation."
    )
    return _measured(
        *(comparison, task, "score-steps", quantity),
        lambda point: (point.scores[metric],) if metric in point.scores else None,
    )


def validation_loss(comparison: Comparison, task: str) -> Chart | None:
    """Draw the loss on the validation rows at every evaluation; None if there is none."""
    quantity = _Quantity(
        "validation_loss",
        "validation loss",
        "validation loss, nats a token  (↓ better)",
        "Loss on the validation rows at every evaluation.",
    )
    return _measured(comparison, task, "validation-loss", quantity, lambda point: (point.loss,))


def general_loss(comparison: Comparison, task: str) -> Chart | None:
    """Draw the mean held-out loss over the domains at every evaluation; None if there is none."""
    quantity = _Quantity(
        "general_loss",
        "general loss",
        "general loss, nats a token  (↓ better)",
        "Mean held-out loss over the other domains at every evaluation.",
    )
    return _measured(
        *(comparison, task, "general-loss", quantity),
        lambda point: (point.general_loss,) if point.general else None,
    )


def training_loss(
    comparison: Comparison, task: str, losses: Mapping[str, Mapping[int, float]]
) -> Chart | None:
    """Draw the training loss as it was logged.

    Args:
        comparison: has the runs.
        task: its name.
        losses: folder of a run -> step -> loss; see `esft.report.charts.logged.training_losses`.

    Returns:
        None if no run has logged any.
    """
    quantity = _Quantity(
        "training_loss",
        "training loss",
        "training loss, nats a token  (↓ better)",
        "Loss on the training rows as it was logged, the mean since the line before.",
    )
    found: dict[str, dict[int, Series]] = {}
    for method, runs in runs_by_method(comparison, task).items():
        by_seed: dict[int, Series] = {
            run.seed: {step: (loss,) for step, loss in sorted(losses[run.folder].items())}
            for run in runs
            if losses.get(run.folder)
        }
        if by_seed:
            found[method] = by_seed
    return _draw(comparison, task, "training-loss", quantity, found)


def _measured(
    comparison: Comparison,
    task: str,
    name: str,
    quantity: _Quantity,
    read: Callable[[Point], tuple[float, ...] | None],
) -> Chart | None:
    by_method = runs_by_method(comparison, task)
    found = {method: series(runs, read) for method, runs in by_method.items()}
    return _draw(comparison, task, name, quantity, {key: one for key, one in found.items() if one})


def _draw(
    comparison: Comparison,
    task: str,
    name: str,
    quantity: _Quantity,
    found: dict[str, dict[int, Series]],
) -> Chart | None:
    if not found:
        return None
    styles = line_styles(comparison.methods)
    title = f"{task}: {quantity.title} over steps"
    header = ("task", "method", "seed", "step", quantity.key)
    with canvas(file_name(name, task), title, header, height=3.0) as (picture, (axes,)):
        for place, (method, by_seed) in enumerate(found.items()):
            line, mean = styles[method], mean_series(by_seed)
            for seed, points in by_seed.items():
                values = [value for (value,) in points.values()]
                picture.rows += [
                    (task, method, seed, step, value)
                    for step, value in zip(points, values, strict=True)
                ]
                if len(by_seed) > 1:
                    axes.plot(list(points), values, color=line.colour, alpha=0.3, linewidth=0.7)
            values = [value for (value,) in mean.values()]
            picture.rows += [
                (task, method, "mean", step, value)
                for step, value in zip(mean, values, strict=True)
            ]
            every = max(1, -(-len(mean) // _MARKED))
            axes.plot(
                *(list(mean), values), **look(line), markevery=every, zorder=3 + 1 / (1 + place)
            )
            picture.line_key(method, line)
        axes.margins(x=0.04, y=0.08)
        axes.set_xlabel("step")
        name_axis(axes, quantity.axis)
        by_method = runs_by_method(comparison, task)
        note = seeds_note({method: by_method[method] for method in found})
        return picture.chart(f"{quantity.note} {note}{left_out(comparison, task)}")

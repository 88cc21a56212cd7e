"""Figures against a value that was tried several ways: a sweep's, or the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from esft.comparison.records import Comparison, RunRecord
from esft.comparison.statistics import Summary
from esft.report.chart import Chart
from esft.report.charts.canvas import Canvas, canvas, look, name_axis
from esft.report.charts.scales import counts_axis, value_axis
from esft.report.charts.seeds import left_out
from esft.report.charts.style import INK, SURFACE, line_styles
from esft.report.charts.text import file_name, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Method -> value -> (seed, figure) of its runs.
Found = dict[str, dict[float, list[tuple[int, float]]]]


def swept_keys(comparison: Comparison) -> list[str]:
    """Return what was swept, in the order in which it was planned."""
    return list(dict.fromkeys(key for record in comparison.records for key in record.sweep))


def sweep(comparison: Comparison, task: str, key: str) -> Chart | None:
    """Draw score, general loss and trained parameters against a swept value, one below the other.

    Args:
        comparison: has the runs.
        task: its name.
        key: that was swept, such as `p`.

    Returns:
        None if no run of the sweep ended.
    """
    runs = [
        run
        for run in comparison.records
        if run.task == task and run.outcome is not None and key in run.sweep
    ]
    chosen = {(run.method, run.sweep[key]) for run in runs if run.chosen}
    # At several learning rates, those at the chosen one count, as in `sweep_series`.
    runs = [run for run in runs if run.chosen or (run.method, run.sweep[key]) not in chosen]
    metric = comparison.metric
    panels = [
        (metric, f"{words(metric)}, test rows  (↑ better)", _score(metric)),
        ("general_loss", "general loss, nats a token  (↓ better)", _general),
        ("trained", "parameters that train", _trained),
    ]
    known = [
        (name, title, found)
        for name, title, read in panels
        if (found := _collect(comparison, runs, lambda run: run.sweep[key], read))
    ]
    if not known:
        return None
    header = ("task", "sweep", "value", "method", "seed", "figure", "number")
    name, title = file_name("sweep", key, task), f"{task}: what {words(key)} does"
    with canvas(name, title, header, height=0.6 + 1.75 * len(known), panels=len(known)) as (
        picture,
        all_axes,
    ):
        for axes, (figure, above, found) in zip(all_axes, known, strict=True):
            _lines(picture, axes, comparison, found, (task, key), figure)
            name_axis(axes, above)
        counts_axis(all_axes[-1])
        value_axis(all_axes[-1], sorted({run.sweep[key] for run in runs}))
        all_axes[-1].set_xlabel(words(key))
        methods = [method for method in comparison.methods if any(method in f for _, _, f in known)]
        for method in methods:
            picture.line_key(method, line_styles(comparison.methods)[method])
        return picture.chart(
            f"Runs at the end of training, with {words(key)} as below and all else the same. "
            f"{_seeds(known[0][2])}"
        )


def learning_rates(comparison: Comparison, task: str) -> Chart | None:
    """Draw each method's last score on the validation rows against the learning rate.

    Returns:
        None if no method was tried at two rates, or nothing was scored.
    """
    metric = comparison.metric
    runs = [
        run
        for run in comparison.records
        if run.task == task and run.outcome is not None and not run.sweep
    ]

    def read(run: RunRecord) -> float | None:
        return run.points[-1].scores.get(metric) if run.points else None

    found = _collect(comparison, runs, lambda run: run.learning_rate, read)
    if not any(len(values) > 1 for values in found.values()):
        return None
    chosen = {run.method: run.learning_rate for run in runs if run.chosen}
    title = f"{task}: {words(metric)} against the learning rate"
    header = ("task", "sweep", "value", "method", "seed", "figure", "number")
    with canvas(file_name("learning-rates", task), title, header, height=3.0) as (picture, (axes,)):
        place = (task, "learning_rate")
        _lines(picture, axes, comparison, found, place, f"validation_{metric}")
        styles = line_styles(comparison.methods)
        for method, values in found.items():
            picture.line_key(method, styles[method])
            if chosen.get(method) in values:
                rate = chosen[method]
                mean = Summary.of([number for _, number in values[rate]]).mean
                axes.plot(rate, mean, "o", markersize=12, fillstyle="none", color=INK, zorder=6)
                picture.rows.append((*place, rate, method, "chosen", f"validation_{metric}", mean))
        picture.key(
            "chosen rate",
            marker="o",
            markersize=10,
            markerfacecolor=SURFACE,
            color=INK,
            linestyle="none",
        )
        value_axis(axes, sorted({rate for values in found.values() for rate in values}), "g")
        axes.margins(x=0.08, y=0.12)
        axes.set_xlabel("learning rate")
        name_axis(axes, f"{words(metric)}, validation rows  (↑ better)")
        return picture.chart(
            f"{words(metric)} on the validation rows when training ends. {_seeds(found)}"
            f"{left_out(comparison, task, all_rates=True)}"
        )


def _score(metric: str) -> Callable[[RunRecord], float | None]:
    def read(run: RunRecord) -> float | None:
        scores = run.outcome.scores if run.outcome else {}
        return scores[metric].value if metric in scores else None

    return read


def _general(run: RunRecord) -> float | None:
    return run.outcome.general_loss if run.outcome and run.outcome.general else None


def _trained(run: RunRecord) -> float | None:
    return run.outcome.trained if run.outcome else None


def _collect(
    comparison: Comparison,
    runs: list[RunRecord],
    at: Callable[[RunRecord], float],
    read: Callable[[RunRecord], float | None],
) -> Found:
    """Return what runs have, by method in the comparison's order, value and seed."""
    found: Found = {}
    for method in comparison.methods:
        for run in sorted((run for run in runs if run.method == method), key=at):
            number = read(run)
            if number is not None:
                found.setdefault(method, {}).setdefault(at(run), []).append((run.seed, number))
    return found


def _lines(
    picture: Canvas,
    axes: Axes,
    comparison: Comparison,
    found: Found,
    about: tuple[str, str],
    figure: str,
) -> None:
    """Draw one line a method, the seeds as dots."""
    styles = line_styles(comparison.methods)
    for place, (method, values) in enumerate(found.items()):
        line = styles[method]
        means = {
            value: Summary.of([number for _, number in of_seeds])
            for value, of_seeds in values.items()
        }
        axes.plot(
            *(list(means), [mean.mean for mean in means.values()]),
            **look(line),
            zorder=3 + 1 / (1 + place),
        )
        for value, of_seeds in values.items():
            picture.rows += [
                (*about, value, method, seed, figure, number) for seed, number in of_seeds
            ]
            picture.rows.append((*about, value, method, "mean", figure, means[value].mean))
            if len(of_seeds) > 1:
                axes.plot(
                    *([value] * len(of_seeds), [number for _, number in of_seeds]),
                    marker=".",
                    markersize=4,
                    color=line.colour,
                    alpha=0.5,
                    linestyle="none",
                )


def _seeds(found: Found) -> str:
    most = max(len(of_seeds) for values in found.values() for of_seeds in values.values())
    return f"Lines: mean over up to {most} seeds; dots: the seeds." if most > 1 else "One seed."

"""What is forgotten against what is learnt, while training: a report's first picture."""

from __future__ import annotations

from esft.comparison.curve import curve
from esft.comparison.records import Comparison
from esft.comparison.tradeoff import ScoreRange, task_range
from esft.report.chart import Chart
from esft.report.charts.canvas import base_line, canvas, look, name_axis
from esft.report.charts.seeds import (
    left_out,
    mean_series,
    runs_by_method,
    score_and_general,
    seeds_note,
    series,
)
from esft.report.charts.style import INK, line_styles
from esft.report.charts.text import clean, file_name, words


def tradeoff(comparison: Comparison, task: str) -> Chart | None:
    """Draw general loss against task score, one line a method, evaluations as markers.

    The legend names methods in the order of what they forgot on average over the range of scores
    at which they are compared, the least first.

    Returns:
        None if no run has an evaluation with both.
    """
    read = score_and_general(comparison.metric)
    by_method = runs_by_method(comparison, task)
    found = {method: series(runs, read) for method, runs in by_method.items()}
    found = {method: by_seed for method, by_seed in found.items() if by_seed}
    if not found:
        return None
    styles = line_styles(comparison.methods)
    scores = task_range(comparison, task)
    forgotten = _forgotten(comparison, task, list(found), scores)
    header = ("task", "method", "seed", "step", comparison.metric, "general_loss")
    title = f"{task}: general loss against {words(comparison.metric)} while training"
    with canvas(file_name("tradeoff", task), title, header) as (picture, (axes,)):
        for place, (method, by_seed) in enumerate(found.items()):
            line, mean = styles[method], mean_series(by_seed)
            for seed, points in by_seed.items():
                across, upwards = zip(*points.values(), strict=True)
                picture.rows += [
                    (task, method, seed, step, *values) for step, values in points.items()
                ]
                if len(by_seed) > 1:
                    axes.plot(across, upwards, color=line.colour, alpha=0.3, linewidth=0.7)
            if mean:
                across, upwards = zip(*mean.values(), strict=True)
                # The first methods on top: they are those that the comparison is about.
                axes.plot(
                    *(across, upwards),
                    **look(line),
                    zorder=3 + 1 / (1 + place),
                    # Step 0 is the same for all, and marked as the base.
                    markevery=slice(0 in mean, None),
                )
                picture.rows += [
                    (task, method, "mean", step, *values) for step, values in mean.items()
                ]
        base = comparison.base.get(task)
        if base is not None and (start := _start(found) or read(base)):
            at = (start[0], start[1])
            base_line(axes, at[1])
            axes.plot(*at, marker="o", markersize=9, color=INK, fillstyle="none", zorder=6)
            picture.rows.append((task, "base", "", 0, *at))
        axes.margins(x=0.06, y=0.1)
        axes.set_xlabel(f"{words(comparison.metric)}, validation rows  (better →)")
        name_axis(axes, "general loss, nats a token  (↓ better)")
        for method in sorted(found, key=lambda name: forgotten.get(name, float("inf"))):
            picture.line_key(method, styles[method])
        lines = seeds_note({method: by_method[method] for method in found})
        return picture.chart(
            "Mean held-out loss over the other domains against the task's score, at every "
            f"evaluation; the ring is the base. {lines}{_order(forgotten, scores)}"
            f"{left_out(comparison, task)}"
        )


def _start(found: dict[str, dict[int, dict[int, tuple[float, ...]]]]) -> tuple[float, ...] | None:
    """Return what the runs themselves measured before their first step, if one did."""
    starts = [points[0] for by_seed in found.values() for points in by_seed.values() if 0 in points]
    return starts[0] if starts else None


def _forgotten(
    comparison: Comparison, task: str, methods: list[str], scores: ScoreRange | None
) -> dict[str, float]:
    """Return what methods forgot on average over the range of scores; those that reach its end."""
    if scores is None:
        return {}
    found = {}
    for method in methods:
        curves = [curve(comparison, run) for run in comparison.of(task, method)]
        means = [one.mean(scores.low, scores.high) for one in curves if one is not None]
        known = [mean for mean in means if mean is not None]
        if known and len(known) == len(means):
            found[method] = sum(known) / len(known)
    return found


def _order(forgotten: dict[str, float], scores: ScoreRange | None) -> str:
    if scores is None or len(forgotten) < 2:
        return ""
    ranked = sorted(forgotten.items(), key=lambda item: item[1])
    names = ", ".join(f"{clean(name)} {value:+.3f}" for name, value in ranked)
    return (
        f" Forgotten at equal score, the mean over scores from {scores.low:.2f} to "
        f"{scores.high:.2f}, least first: {names}."
    )

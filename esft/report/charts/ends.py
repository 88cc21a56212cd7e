"""Where methods end: score against bytes saved, and general loss against score, with spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from esft.comparison import figures
from esft.comparison.figures import Figure, by_seed
from esft.comparison.records import Comparison
from esft.comparison.statistics import Summary
from esft.report.chart import Chart
from esft.report.charts.canvas import Canvas, base_line, canvas, dot, name_axis
from esft.report.charts.scales import bytes_axis
from esft.report.charts.seeds import left_out
from esft.report.charts.style import line_styles
from esft.report.charts.text import file_name, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def score_against_bytes(comparison: Comparison, task: str | None = None) -> Chart | None:
    """Draw the test score of each method against the bytes that it saves.

    Args:
        comparison: has the runs.
        task: its name; None takes the mean over all tasks.

    Returns:
        None if no run has both.
    """
    saved = next(figure for figure in figures.costs() if figure.key == "bytes")
    score = figures.score(comparison.metric)

    def dress(axes: Axes) -> None:
        axes.set_xscale("log")
        bytes_axis(axes)
        axes.set_xlabel("bytes saved  (← better)")
        name_axis(axes, f"{words(comparison.metric)}, test rows  (↑ better)")

    name, title = "score-bytes", f"{words(comparison.metric)} against bytes saved"
    note = f"Test rows' {words(comparison.metric)} against the bytes of the saved weights."
    return _draw(comparison, task, name, title, note, (saved, score), dress)


def general_against_score(comparison: Comparison, task: str | None = None) -> Chart | None:
    """Draw the general loss of each method against its test score when training ends.

    Args:
        comparison: has the runs.
        task: its name; None takes the mean over all tasks.

    Returns:
        None if no run has both.
    """
    score, general = figures.score(comparison.metric), figures.general_average()
    base_loss = figures.of_base(comparison, general, _tasks(comparison, task))

    def dress(axes: Axes) -> None:
        axes.set_xlabel(f"{words(comparison.metric)}, test rows  (better →)")
        name_axis(axes, "general loss, nats a token  (↓ better)")
        if base_loss is not None:
            base_line(axes, base_loss)

    note = "Mean held-out loss over the other domains against the score on the test rows."
    name, title = "general-score", f"general loss against {words(comparison.metric)} at the end"
    return _draw(comparison, task, name, title, note, (score, general), dress)


def _draw(
    comparison: Comparison,
    task: str | None,
    name: str,
    title: str,
    note: str,
    plane: tuple[Figure, Figure],
    dress: Callable[[Axes], None],
) -> Chart | None:
    """Draw one marker a method, its spread as a cross; `plane` is what goes across and upwards."""
    tasks = _tasks(comparison, task)
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for method in comparison.methods:
        across, upwards = (by_seed(comparison, method, figure, tasks) for figure in plane)
        if both := {seed: (across[seed], upwards[seed]) for seed in across if seed in upwards}:
            found[method] = both
    if not found:
        return None
    about = task if task is not None else "all tasks" if len(tasks) > 1 else tasks[0]
    file = file_name(name) if task is None else file_name(name, task)
    header = ("task", "method", "seed", *(figure.key for figure in plane))
    with canvas(file, f"{about}: {title}", header) as (picture, (axes,)):
        styles = line_styles(comparison.methods)
        for method, values in found.items():
            _mark(picture, axes, about, method, values, dot(styles[method]))
        axes.margins(x=0.08, y=0.1)
        dress(axes)
        several = any(len(values) > 1 for values in found.values())
        spread = (
            " Markers: mean over seeds; crosses: one standard deviation (n − 1) to each side; "
            "dots: the seeds."
        )
        base = figures.of_base(comparison, figures.score(comparison.metric), tasks)
        start = "" if base is None else f" The base scores {base:.3g}."
        absent = left_out(comparison, task) if task is not None else ""
        return picture.chart(f"{note}{spread if several else ' One run a method.'}{start}{absent}")


def _mark(
    picture: Canvas,
    axes: Axes,
    about: str,
    method: str,
    values: dict[int, tuple[float, float]],
    shown: dict[str, Any],
) -> None:
    """Draw one method."""
    colour = shown["color"]
    x, y = (Summary.of([pair[at] for pair in values.values()]) for at in (0, 1))
    picture.rows += [(about, method, seed, *pair) for seed, pair in values.items()]
    picture.rows.append((about, method, "mean", x.mean, y.mean))
    if x.spread is not None and y.spread is not None:
        picture.rows.append((about, method, "spread", x.spread, y.spread))
        axes.plot(*zip(*values.values(), strict=True), ".", color=colour, alpha=0.5, markersize=4)
        # On a logarithmic axis a spread wider than the mean would leave the picture.
        left = x.mean - x.spread
        if axes.get_xscale() == "log" and left <= 0:
            left = min(pair[0] for pair in values.values())
        axes.plot([left, x.mean + x.spread], [y.mean] * 2, color=colour, linewidth=1.3)
        axes.plot([x.mean] * 2, [y.mean - y.spread, y.mean + y.spread], color=colour, linewidth=1.3)
    axes.plot([x.mean], [y.mean], **shown, zorder=5)
    picture.key(method, **shown)


def _tasks(comparison: Comparison, task: str | None) -> list[str]:
    return comparison.tasks if task is None else [task]

"""Experts by layer: their scores with the selection outlined, and how many of them train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from esft.comparison.records import Comparison
from esft.report.chart import Chart
from esft.report.charts.canvas import canvas, look, name_axis
from esft.report.charts.cells import colour_bar, draw_cells, sparse_ticks
from esft.report.charts.scales import whole_axis
from esft.report.charts.style import SMALL, WIDTH, Line, blues, line_styles
from esft.report.charts.text import file_name
from esft.scores import Scores
from esft.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEANING = {"token": "share of the tokens' choices", "gate": "share of the gate values"}
_ASIDE = 0.3  # of the way to the next layer, from the first method's marker to the last one's
_WIDEST = 9.0  # inches; more experts than fit get narrower cells


def expert_map(
    scores: Scores,
    *,
    name: str,
    title: str,
    selection: Selection | None = None,
    metric: str = "token",
) -> Chart:
    """Draw each expert's share of its layer: layers down, experts across.

    Args:
        scores: from `profile`, or read from a file.
        name: of the chart.
        title: of the chart.
        selection: the experts to outline.
        metric: `token` or `gate`.

    Raises:
        SelectionError: the selection has a layer or an expert that the scores do not have.
    """
    layers, shares_LE = percentages(scores, metric)
    outlined = outlines(scores, layers, selection)
    header = ("layer", "expert", "percent_of_layer", "selected")
    width, height, size = cell_sizes(*shares_LE.shape)
    with canvas(name, title, header, height=height, width=width) as (picture, (axes,)):
        draw_experts(picture.figure, axes, layers, shares_LE, outlined, size=size, below=True)
        for row, layer in enumerate(layers):
            for expert in range(scores.layers[layer].experts):
                chosen = int((row, expert) in outlined)
                picture.rows.append((layer, expert, float(shares_LE[row, expert]), chosen))
        return picture.chart(f"Colour: {caption(metric, selection)}.")


def draw_experts(
    figure: Figure,
    axes: Axes,
    layers: Sequence[int],
    shares_LE: np.ndarray,
    outlined: set[tuple[int, int]],
    *,
    size: float,
    below: bool,
) -> None:
    """Draw the cells of an expert map.

    Args:
        figure: that the axes are of.
        axes: to draw on.
        layers: their indices, from above.
        shares_LE: percentages; NaN where a layer has fewer experts.
        outlined: (row, expert) of those that are selected.
        size: of the letters, in points.
        below: whether the colours are explained below the cells, or else at their right.
    """
    count = shares_LE.shape[1]
    top = float(np.nanmax(shares_LE)) or 1.0
    mapped = draw_cells(axes, shares_LE, blues(), (0.0, top), outlined=outlined)
    dress_experts(figure, axes, layers, count, size=size)
    colour_bar(figure, axes, mapped, "% of the layer", size, below=below)


def dress_experts(
    figure: Figure, axes: Axes, layers: Sequence[int], count: int, *, size: float
) -> None:
    """Name the cells of layers and experts; see `draw_experts`."""
    letter = size / 72
    room, height = figure.get_size_inches()
    axes.set_yticks(*sparse_ticks(layers, (height - 1) / len(layers) / (1.3 * letter)))
    axes.set_xticks(*sparse_ticks(range(count), (room - 1) / count / (2.6 * letter)))
    axes.tick_params(labelsize=size - 1)
    axes.set_xlabel("expert", fontsize=size)
    axes.set_ylabel("layer", fontsize=size)


def percentages(scores: Scores, metric: str) -> tuple[list[int], np.ndarray]:
    """Return the layers, and each expert's percentage `[L, E]`; NaN where a layer has fewer."""
    layers = sorted(scores.layers)
    rows = [scores.layers[layer].metric(metric) for layer in layers]
    result = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        result[place, : len(row)] = 100 * np.array(row) / (sum(row) or 1.0)
    return layers, result


def outlines(
    scores: Scores, layers: Sequence[int], selection: Selection | None
) -> set[tuple[int, int]]:
    """Return (row, expert) of the selected experts.

    Raises:
        SelectionError: the scores do not have one of them.
    """
    if selection is None:
        return set()
    selection.check_against({index: layer.experts for index, layer in scores.layers.items()})
    row_of = {layer: row for row, layer in enumerate(layers)}
    return {(row_of[layer], expert) for layer, ids in selection.experts.items() for expert in ids}


def caption(metric: str, selection: Selection | None) -> str:
    """Return what colours and outlines of an expert map say."""
    text = MEANING[metric]
    if selection is None:
        return text
    summary = selection.summary()
    text += f"; outlined: {summary.experts} selected experts"
    if summary.share_of_model is None:
        return text
    return f"{text}, {100 * summary.share_of_model:.1f} % of the model's parameters"


def cell_sizes(rows: int, columns: int) -> tuple[float, float, float]:
    """Return width and height of a picture of cells in inches, and its letters' size in points.

    A picture that is wider is shown smaller on a phone, so its letters are larger.
    """
    width = float(np.clip(columns * 0.062 + 0.8, WIDTH, _WIDEST))
    height = rows * float(np.clip(2.2 / rows, 0.09, 0.4)) * width / WIDTH + 1.1
    return width, height, SMALL * width / WIDTH


def experts_per_layer(comparison: Comparison, task: str) -> Chart | None:
    """Draw how many experts train in each layer, one line a method, the mean over seeds.

    Returns:
        None if no method selects experts.
    """
    chosen = {}
    for method in comparison.methods:
        runs = [run.outcome.selection for run in comparison.of(task, method) if run.outcome]
        if known := [selection for selection in runs if selection]:
            chosen[method] = known
    if not chosen:
        return None
    title = f"{task}: experts that train, by layer"
    return _per_layer(file_name("experts-per-layer", task), title, chosen, comparison.methods)


def selected_per_layer(
    selections: Mapping[str, Mapping[int, Sequence[int]]], *, name: str, title: str
) -> Chart:
    """Draw how many experts are selected in each layer, one line a selection.

    Args:
        selections: what each is called, such as its task -> layer -> experts.
        name: of the chart.
        title: of the chart.
    """
    chosen = {key: [selection] for key, selection in selections.items()}
    return _per_layer(name, title, chosen, list(selections))


def _per_layer(
    name: str,
    title: str,
    chosen: Mapping[str, Sequence[Mapping[int, Sequence[int]]]],
    all_names: Sequence[str],
) -> Chart:
    layers = sorted({layer for several in chosen.values() for one in several for layer in one})
    styles: dict[str, Line] = line_styles(all_names)
    with canvas(name, title, ("layer", "name", "experts"), height=2.6) as (picture, (axes,)):
        for place, (key, several) in enumerate(chosen.items()):
            counts = [sum(len(one.get(layer, ())) for one in several) for layer in layers]
            means = [count / len(several) for count in counts]
            every = max(1, -(-len(layers) // 16))
            # Side by side, since methods may train as many.
            aside = _ASIDE * ((place + 0.5) / len(chosen) - 0.5)
            axes.plot(
                *([layer + aside for layer in layers], means),
                **look(styles[key]),
                markevery=every,
                zorder=3 + 1 / (1 + place),
            )
            picture.rows += [(layer, key, mean) for layer, mean in zip(layers, means, strict=True)]
            picture.line_key(key, styles[key])
        axes.set_ylim(bottom=0)
        axes.margins(x=0.04)
        whole_axis(axes)
        axes.set_xlabel("layer")
        name_axis(axes, "experts")
        most = max(len(several) for several in chosen.values())
        mean = f", the mean over {most} seeds" if most > 1 else ""
        return picture.chart(f"Selected experts of each layer{mean}.")

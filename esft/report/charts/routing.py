"""Routing before training and after it: the routers are frozen, what they see is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from esft.comparison.records import Comparison
from esft.report.chart import Chart
from esft.report.charts.canvas import canvas, name_axis
from esft.report.charts.cells import colour_bar, draw_cells
from esft.report.charts.experts import MEANING, cell_sizes, dress_experts, outlines, percentages
from esft.report.charts.scales import whole_axis
from esft.report.charts.seeds import left_out
from esft.report.charts.style import INK, SMALL, SURFACE, WIDTH, changes, line_styles
from esft.report.charts.text import clean, file_name, wrap
from esft.scores import Scores
from esft.selection import Selection


def routing_change(
    before: Scores,
    after: Scores,
    *,
    name: str,
    title: str,
    selection: Selection | None = None,
    metric: str = "gate",
) -> Chart:
    """Draw by how much each expert's share of its layer changed: layers down, experts across.

    Args:
        before: scores of the model before training.
        after: of the trained model, on the same sample.
        name: of the chart.
        title: of the chart.
        selection: the experts to outline.
        metric: `token` or `gate`.

    Raises:
        SelectionError: the selection has a layer or an expert that the scores do not have.
    """
    layers, old_LE = percentages(before, metric)
    _, new_LE = percentages(after, metric)
    outlined = outlines(before, layers, selection)
    difference_LE = new_LE - old_LE
    width, height, size = cell_sizes(*difference_LE.shape)
    header = ("layer", "expert", "percent_before", "percent_after", "change", "selected")
    with canvas(name, title, header, height=height, width=width) as (picture, (axes,)):
        most = float(np.nanmax(np.abs(difference_LE))) or 1.0
        mapped = draw_cells(
            axes, difference_LE, changes(), (-most, most), outlined=outlined, rim=INK
        )
        dress_experts(picture.figure, axes, layers, difference_LE.shape[1], size=size)
        label = "percentage points of the layer, after − before"
        colour_bar(picture.figure, axes, mapped, label, size, below=True)
        for row, layer in enumerate(layers):
            for expert in range(before.layers[layer].experts):
                numbers = (float(table[row, expert]) for table in (old_LE, new_LE, difference_LE))
                picture.rows.append((layer, expert, *numbers, int((row, expert) in outlined)))
        rims = "; outlined: the selected experts" if outlined else ""
        return picture.chart(f"Change of the {MEANING[metric]} by training{rims}.")


def selected_share(
    before: Scores,
    after: Scores,
    selection: Selection,
    *,
    name: str,
    title: str,
    metric: str = "gate",
) -> Chart:
    """Draw the selected experts' share of each layer before training and after it.

    Args:
        before: scores of the model before training.
        after: of the trained model, on the same sample.
        selection: the experts that trained.
        name: of the chart.
        title: of the chart.
        metric: `token` or `gate`.

    Raises:
        SelectionError: the selection has a layer or an expert that the scores do not have.
    """
    layers, old_LE = percentages(before, metric)
    _, new_LE = percentages(after, metric)
    outlined = outlines(before, layers, selection)
    sums = {
        layer: tuple(
            math.fsum(float(table[row, expert]) for at, expert in outlined if at == row)
            for table in (old_LE, new_LE)
        )
        for row, layer in enumerate(layers)
        if any(at == row for at, _ in outlined)
    }
    with canvas(name, title, ("layer", "percent_before", "percent_after"), height=2.6) as (
        picture,
        (axes,),
    ):
        colour = line_styles(["one"])["one"].colour
        shown = list(sums)
        old, new = ([pair[at] for pair in sums.values()] for at in (0, 1))
        axes.vlines(shown, old, new, color=colour, linewidth=1.6, alpha=0.6)
        axes.plot(shown, old, **_hollow(colour))
        axes.plot(shown, new, **_full(colour))
        picture.rows += [(layer, *pair) for layer, pair in sums.items()]
        picture.key("before training", **_hollow(colour))
        picture.key("after training", **_full(colour))
        axes.margins(x=0.06, y=0.15)  # first: a limit ends the scaling, and cuts markers in half
        axes.set_ylim(bottom=0)
        whole_axis(axes)
        axes.set_xlabel("layer")
        name_axis(axes, "% of the layer")
        return picture.chart(
            f"Selected experts' {MEANING[metric]} in each layer, on the same tokens."
        )


def routing_of_methods(comparison: Comparison, task: str) -> Chart | None:
    """Draw the selected experts' share of gate values before and after, one row a method.

    Returns:
        None if no run has measured it.
    """
    found = {}
    for method in comparison.methods:
        drifts = {
            run.seed: run.outcome.drift
            for run in comparison.of(task, method)
            if run.outcome is not None and run.outcome.drift is not None
        }
        if drifts:
            found[method] = {
                seed: (100 * drift["before"], 100 * drift["after"])
                for seed, drift in drifts.items()
            }
    if not found:
        return None
    styles = line_styles(comparison.methods)
    header = ("task", "method", "seed", "percent_before", "percent_after")
    title = f"{task}: the selected experts' share before and after training"
    names = {method: wrap(clean(method), WIDTH - 0.6, SMALL) for method in found}
    height = 0.9 + (0.27 + 0.15 * max(map(len, names.values()))) * len(found)
    with canvas(file_name("routing-methods", task), title, header, height=height) as (
        picture,
        (axes,),
    ):
        for row, (method, by_seed) in enumerate(found.items()):
            colour = styles[method].colour
            means = tuple(
                math.fsum(pair[at] for pair in by_seed.values()) / len(by_seed) for at in (0, 1)
            )
            picture.rows += [(task, method, seed, *pair) for seed, pair in by_seed.items()]
            picture.rows.append((task, method, "mean", *means))
            axes.plot(means, [row, row], color=colour, linewidth=2.2, alpha=0.6)
            axes.plot(means[0], row, **_hollow(colour))
            axes.plot(means[1], row, **_full(colour))
            # Above its row, where also a long name has room.
            axes.annotate(
                *("\n".join(names[method]), (0, row)),
                xycoords=axes.get_yaxis_transform(),
                xytext=(2, 6),
                textcoords="offset points",
                fontsize=SMALL,
                va="bottom",
            )
        axes.set_yticks([])
        axes.set_ylim(len(found) - 0.6, -0.85)
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("% of a layer's gate values, mean of the layers")
        picture.key("before training", **_hollow(INK))
        picture.key("after training", **_full(INK))
        seeds = max(map(len, found.values()))
        mean = f" Mean over up to {seeds} seeds." if seeds > 1 else ""
        return picture.chart(
            f"Share of the gate values that went to the selected experts, on the same tokens.{mean}"
            f"{left_out(comparison, task)}"
        )


def _hollow(colour: str) -> dict[str, Any]:
    return {
        **_full(colour),
        "markerfacecolor": SURFACE,
        "markeredgecolor": colour,
        "markeredgewidth": 1.6,
    }


def _full(colour: str) -> dict[str, Any]:
    return {
        "marker": "o",
        "markersize": 7.0,
        "color": colour,
        "markeredgecolor": SURFACE,
        "markeredgewidth": 0.6,
        "linestyle": "none",
    }

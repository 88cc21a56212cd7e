"""How many of their selected experts tasks share: each pair over all layers, and layer by layer."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from esft.overlap import Overlap
from esft.report.chart import Chart
from esft.report.charts.canvas import canvas
from esft.report.charts.cells import colour_bar, draw_cells, sparse_ticks
from esft.report.charts.style import SMALL, WIDTH, blues
from esft.report.charts.text import clean, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME = 1.5  # inches that a name may take beside the cells
_NUMBERED = 9  # layers; in more, a cell is too narrow for its number
MEANING = "experts in both / experts in either"


def overlap_map(found: Overlap, *, name: str, title: str) -> Chart:
    """Draw which share of their experts tasks have in common, 0 to 1.

    Args:
        found: from `esft.overlap`.
        name: of the chart.
        title: of the chart.
    """
    pairs, layers, _ = overlaps_by_layer(found)
    rows = [len(found.names), len(pairs)]
    lines = [_height(found.names), _height(_names(found, pairs))]
    heights = [count * line for count, line in zip(rows, lines, strict=True)]
    header = ("layer", "first", "second", "overlap")
    total = sum(heights) + 2.6
    with canvas(name, title, header, height=total) as (picture, (axes,)):
        axes.remove()
        upper, lower = picture.figure.subplots(2, 1, height_ratios=heights)
        draw_total(upper, found, size=SMALL)
        mapped = draw_by_layer(
            lower, found, numbers=len(layers) <= _NUMBERED, size=SMALL, across=WIDTH - _NAME - 0.4
        )
        colour_bar(picture.figure, lower, mapped, MEANING, SMALL, below=True)
        for a, b in pairs:
            first, second = found.names[a], found.names[b]
            picture.rows.append(("all", first, second, found.total[a][b]))
            picture.rows += [(layer, first, second, found.layers[layer][a][b]) for layer in layers]
        counts = ", ".join(
            f"{clean(task)} {count}" for task, count in zip(found.names, found.experts, strict=True)
        )
        return picture.chart(
            f"Jaccard index, {MEANING}: above over all layers, below layer by layer. "
            f"Experts selected: {counts}."
        )


def overlaps_by_layer(found: Overlap) -> tuple[list[tuple[int, int]], list[int], np.ndarray]:
    """Return the pairs of tasks, the layers, and the overlaps `[pairs, layers]`."""
    pairs = list(combinations(range(len(found.names)), 2))
    layers = sorted(found.layers)
    return pairs, layers, np.array([[found.layers[at][a][b] for at in layers] for a, b in pairs])


def draw_total(axes: Axes, found: Overlap, *, size: float) -> None:
    """Draw each pair of tasks over all layers, with its number."""
    draw_cells(axes, np.array(found.total), blues(), (0.0, 1.0), numbers=True, size=size - 1)
    broken = ["\n".join(wrap(clean(task), _NAME, size)) for task in found.names]
    axes.set_yticks(range(len(broken)), broken, fontsize=size)
    axes.set_xticks(range(len(broken)), broken, fontsize=size)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_title("all layers", loc="left", fontsize=size)


def draw_by_layer(axes: Axes, found: Overlap, *, numbers: bool, size: float, across: float) -> Any:
    """Draw each pair of tasks layer by layer.

    Args:
        axes: to draw on.
        found: the overlaps.
        numbers: whether cells have their numbers in them.
        size: of the letters, in points.
        across: inches that the cells have.

    Returns:
        what `colour_bar` takes.
    """
    pairs, layers, by_layer = overlaps_by_layer(found)
    mapped = draw_cells(axes, by_layer, blues(), (0.0, 1.0), numbers=numbers, size=size - 1)
    broken = ["\n".join(wrap(text, _NAME, size)) for text in _names(found, pairs)]
    axes.set_yticks(range(len(pairs)), broken, fontsize=size)
    axes.set_xticks(*sparse_ticks(layers, across / len(layers) / (2.6 * size / 72)), fontsize=size)
    axes.set_xlabel("layer", fontsize=size)
    axes.set_title("layer by layer", loc="left", fontsize=size)
    return mapped


def _names(found: Overlap, pairs: list[tuple[int, int]]) -> list[str]:
    return [f"{clean(found.names[a])} / {clean(found.names[b])}" for a, b in pairs]


def _height(names: list[str]) -> float:
    """Return inches that a row needs for its name."""
    return max(0.3, 0.17 * max(len(wrap(clean(name), _NAME, SMALL)) for name in names) + 0.08)

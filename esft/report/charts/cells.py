"""Numbers as coloured cells, in levels: each level is one path, which dark ground can recolour."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from esft.report.charts.style import INK, MISSING, MUTED, ON_PALE, ON_STRONG, OUTLINE, SURFACE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STRONG = 0.7  # of the way through the levels: from here on, letters for strong ground
_NO_CELL = -1
Corner = tuple[int, int]  # row, column


def draw_cells(
    axes: Axes,
    values: np.ndarray,
    colours: Sequence[str],
    span: tuple[float, float],
    *,
    outlined: Collection[Corner] = (),
    rim: str = OUTLINE,
    numbers: bool = False,
    size: float = 8.0,
) -> Any:
    """Draw a matrix as cells, the first row on top.

    Args:
        axes: to draw on.
        values: `[rows, columns]`; NaN where there is nothing.
        colours: of the levels.
        span: the values of the first level's lower end and of the last one's upper end.
        outlined: (row, column) of the cells that get a rim.
        rim: its colour.
        numbers: whether each cell has its number in it, to two decimals.
        size: of these numbers, in points.

    Returns:
        what `colour_bar` takes.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    rows, columns = values.shape
    low, high = span
    parts = np.nan_to_num((values - low) / ((high - low) or 1.0))
    levels = np.clip((parts * len(colours)).astype(int), 0, len(colours) - 1)
    levels[np.isnan(values)] = _NO_CELL
    for level in np.unique(levels):
        colour = MISSING if level == _NO_CELL else colours[level]
        _add(axes, _runs(levels, level), facecolor=colour, edgecolor="none")
    # Lines between the cells, so that pale neighbours can be told apart.
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color=SURFACE, linewidth=0.5)
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color=SURFACE, linewidth=0.5)
    if outlined:
        rims = [(row, column, column + 1) for row, column in sorted(outlined)]
        _add(axes, rims, facecolor="none", edgecolor=rim, linewidth=1.6, zorder=3)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(visible=False)
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set(visible=True, color=MUTED, linewidth=0.6)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            strong = levels[row, column] >= _STRONG * len(colours)
            letters = ON_STRONG if strong else ON_PALE
            axes.text(
                *(column, row, f"{value:.2f}"),
                ha="center",
                va="center",
                color=letters,
                fontsize=size,
            )
    return ScalarMappable(Normalize(low, high), ListedColormap(list(colours)))


def colour_bar(
    figure: Figure, axes: Axes, mapped: Any, label: str, size: float, *, below: bool
) -> None:
    """Draw what colours stand for, below the cells or at their right."""
    if below:
        bar = figure.colorbar(mapped, ax=axes, location="bottom", aspect=45, pad=0.02, shrink=0.9)
    else:
        bar = figure.colorbar(mapped, ax=axes, pad=0.02)
    bar.set_label(label, fontsize=size, color=INK)
    bar.ax.tick_params(labelsize=size - 1)
    bar.outline.set(visible=False)


def sparse_ticks(labels: Sequence[Any], room: float) -> tuple[list[int], list[str]]:
    """Return places and texts of as many labels as fit.

    Args:
        labels: one a cell.
        room: how many labels fit into one cell.
    """
    steps = (1, 2, 4, 8, 16, 32, len(labels))
    step = max(1, next((step for step in steps if step * room >= 1), len(labels)))
    places = list(range(0, len(labels), step))
    return places, [str(labels[place]) for place in places]


def _runs(levels: np.ndarray, level: int) -> list[tuple[int, int, int]]:
    """Return where neighbours in a row have a level: (row, first column, column after the last)."""
    found = []
    for row, line in enumerate(levels):
        same = np.concatenate(([0], line == level, [0])).astype(np.int8)
        edges = np.flatnonzero(np.diff(same))
        found += [(row, int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return found


def _add(axes: Axes, runs: Iterable[tuple[int, int, int]], **look: Any) -> None:
    """Add rectangles over runs of cells as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners: list[tuple[float, float]] = []
    codes: list[Any] = []
    for row, start, stop in runs:
        left, right, top, bottom = start - 0.5, stop - 0.5, row - 0.5, row + 0.5
        corners += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    axes.add_patch(PathPatch(Path(corners, codes), clip_on=False, **look))

"""The overlap of tasks as a PNG: how many of their selected experts they share."""

from __future__ import annotations

import io
from pathlib import Path

from esft.files import write_bytes
from esft.overlap import Overlap
from esft.report.charts.cells import colour_bar
from esft.report.charts.overlaps import MEANING, draw_by_layer, draw_total
from esft.report.charts.svg import drawing

_CELL = 0.62  # inches, wide enough for a number
_LETTERS = 9.0  # points
_DPI = 150


def draw_overlap(found: Overlap, path: str | Path, *, title: str | None = None) -> None:
    """Draw which share of their experts tasks have in common as a PNG, written atomically.

    On the left each pair of tasks over all layers, on the right each pair layer by layer.

    Args:
        found: from `esft.overlap.overlap`.
        path: of the picture.
        title: above the picture; None says what it shows.

    Raises:
        OutputError: the file cannot be written.
    """
    # Slow to import, and Figure without pyplot keeps no global state and needs no display.
    from matplotlib.figure import Figure

    tasks, layers = len(found.names), len(found.layers)
    rows = max(tasks, tasks * (tasks - 1) // 2)
    numbers = layers <= 16
    widths = [tasks * _CELL, layers * (_CELL if numbers else 0.3)]
    letters = min(1.5, 0.09 * max(map(len, found.names)))  # inches that names take beside the cells
    picture = io.BytesIO()
    with drawing("overlap"):
        figure = Figure(
            figsize=(sum(widths) + 3 * letters + 2.6, rows * 0.42 + letters + 1.5),
            dpi=_DPI,
            layout="constrained",
        )
        left, right = figure.subplots(1, 2, width_ratios=widths)
        draw_total(left, found, size=_LETTERS)
        mapped = draw_by_layer(right, found, numbers=numbers, size=_LETTERS, across=widths[1])
        colour_bar(figure, right, mapped, MEANING, _LETTERS, below=False)
        heading = title or "Selected experts that tasks share"
        figure.suptitle(heading, x=0.01, ha="left", fontsize=10)
        figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())

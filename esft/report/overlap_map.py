"""The overlap of tasks as a picture: how many of their selected experts they share."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esft.files import write_bytes
from esft.overlap import Overlap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = "Blues"  # as the expert heat map: lightness alone orders them
_DARK = 0.55  # from here on, white digits
_CELL = 0.62  # inches, wide enough for a number
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

    tasks, layers = len(found.names), sorted(found.layers)
    pairs = list(combinations(range(tasks), 2))
    names = [f"{found.names[a]} / {found.names[b]}" for a, b in pairs]
    by_layer = np.array([[found.layers[layer][a][b] for layer in layers] for a, b in pairs])
    numbers = len(layers) <= 16
    widths = [tasks * _CELL, len(layers) * (_CELL if numbers else 0.3)]
    letters = 0.09 * max(map(len, found.names))  # inches that names take beside the cells
    figure = Figure(
        figsize=(sum(widths) + 3 * letters + 2.6, max(tasks, len(pairs)) * 0.42 + letters + 1.5),
        dpi=_DPI,
        layout="constrained",
    )
    left, right = figure.subplots(1, 2, width_ratios=widths)
    _cells(left, np.array(found.total), found.names, found.names, numbers=True)
    left.set_title("all layers", loc="left", fontsize=9)
    for label in left.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
    image = _cells(right, by_layer, names, [str(layer) for layer in layers], numbers=numbers)
    right.set_title("layer by layer", loc="left", fontsize=9)
    right.set_xlabel("layer")
    bar = figure.colorbar(image, ax=right, pad=0.02)
    bar.set_label("experts in both / experts in either", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(title or "Selected experts that tasks share", x=0.01, ha="left", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())


def _cells(
    axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], *, numbers: bool
) -> Any:
    """Draw values 0 to 1 as coloured cells, with their numbers if asked for."""
    image = axes.imshow(values, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(labelsize=8)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value > _DARK else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8
            )
    return image

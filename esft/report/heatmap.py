"""The expert heat map as a PNG: layers down, experts across, the selected ones outlined."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from esft.files import write_bytes
from esft.report.charts.experts import caption, draw_experts, outlines, percentages
from esft.report.charts.svg import drawing
from esft.scores import Scores
from esft.selection import Selection

_MARGIN_X, _MARGIN_Y = 1.6, 1.0  # inches around the cells
_LETTERS = 9.0  # points
_DPI = 150


def draw_heatmap(
    scores: Scores,
    path: str | Path,
    *,
    selection: Selection | None = None,
    metric: str = "token",
    title: str | None = None,
) -> None:
    """Draw each expert's share of its layer as a PNG, written atomically.

    Args:
        scores: from `profile`, or read from a file.
        path: of the picture.
        selection: the experts to outline.
        metric: `token` or `gate`.
        title: above the picture; None names the model and the data.

    Raises:
        SelectionError: the selection has a layer or an expert that the scores do not have.
        OutputError: the file cannot be written.
    """
    # Slow to import, and Figure without pyplot keeps no global state and needs no display.
    from matplotlib.figure import Figure

    layers, shares_LE = percentages(scores, metric)
    outlined = outlines(scores, layers, selection)
    height, width = shares_LE.shape
    # Inches a cell: about as wide as a page allows; a few layers get taller cells.
    across = float(np.clip(11 / width, 0.11, 0.5))
    down = float(np.clip(2 / height, across, 0.4))
    size = (max(width * across, 6) + _MARGIN_X, max(height * down, 1) + _MARGIN_Y)
    picture = io.BytesIO()
    with drawing("heatmap"):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        axes = figure.add_subplot()
        draw_experts(*(figure, axes, layers, shares_LE, outlined), size=_LETTERS, below=False)
        heading = f"{title or _title(scores)}\ncolour: {caption(metric, selection)}"
        axes.set_title(heading, loc="left", fontsize=_LETTERS)
        figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())


def _title(scores: Scores) -> str:
    model, data = scores.model.get("name"), scores.sample.get("data")
    # The last two parts: a file is often called train.jsonl.
    task = "/".join(Path(data).parts[-2:]) if data else None
    return f"Experts of {model or 'the model'}" + (f" on {task}" if task else "")

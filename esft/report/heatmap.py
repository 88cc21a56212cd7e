"""The expert heat map: layers down, experts across, colour for share, selected ones outlined."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from esft.files import write_bytes
from esft.scores import Scores
from esft.selection import Selection

# Lightness alone orders the blues, and blue against vermilion differs for every kind of colour
# vision (Okabe and Ito, "Color Universal Design").
_COLOURS = "Blues"
_OUTLINE = "#d55e00"
_MISSING = "#dddddd"  # layers with fewer experts than others
_MEANING = {"token": "share of the tokens' choices", "gate": "share of the gate values"}
_MARGIN_X, _MARGIN_Y = 1.6, 1.0  # inches around the cells
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
    from matplotlib import colormaps
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    if selection is not None:
        selection.check_against({index: layer.experts for index, layer in scores.layers.items()})
    layers = sorted(scores.layers)
    shares_LE = _percentages(scores, layers, metric)
    height, width = shares_LE.shape
    # Inches a cell: about as wide as a page allows; a few layers get taller cells.
    across = float(np.clip(11 / width, 0.11, 0.5))
    down = float(np.clip(2 / height, across, 0.4))
    figure = Figure(
        figsize=(max(width * across, 6) + _MARGIN_X, max(height * down, 1) + _MARGIN_Y),
        dpi=_DPI,
        layout="constrained",
    )
    axes = figure.add_subplot()
    colours = colormaps[_COLOURS].with_extremes(bad=_MISSING)
    image = axes.imshow(shares_LE, cmap=colours, vmin=0, aspect="auto", interpolation="nearest")
    axes.set_yticks(*_ticks(layers, _step(height, down / 0.14)))
    axes.set_xticks(*_ticks(range(width), _step(width, across / 0.2)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    heading = f"{title or _title(scores)}\n{_legend(metric, selection)}"
    axes.set_title(heading, loc="left", fontsize=9)
    # Light lines between the cells, so that pale neighbours can be told apart.
    axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("% of the layer", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if selection is not None:
        row_of = {layer: row for row, layer in enumerate(layers)}
        outlines = [
            Rectangle((expert - 0.5, row_of[layer] - 0.5), 1, 1)
            for layer, ids in selection.experts.items()
            for expert in ids
        ]
        axes.add_collection(
            PatchCollection(outlines, facecolor="none", edgecolor=_OUTLINE, linewidth=1.6, zorder=3)
        )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())


def _percentages(scores: Scores, layers: list[int], metric: str) -> np.ndarray:
    """Return each expert's percentage of its layer, `[L, E]`; NaN where a layer has fewer."""
    rows = [scores.layers[layer].metric(metric) for layer in layers]
    result = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        result[place, : len(row)] = 100 * np.array(row) / (sum(row) or 1.0)
    return result


def _step(count: int, room: float) -> int:
    """Return how many cells apart labels must be, where one needs 1 / `room` cells."""
    return next(step for step in (1, 2, 4, 8, 16, 32, count) if step * room >= 1)


def _ticks(labels: list[int] | range, step: int) -> tuple[list[int], list[str]]:
    places = list(range(0, len(labels), step))
    return places, [str(labels[place]) for place in places]


def _title(scores: Scores) -> str:
    model, data = scores.model.get("name"), scores.sample.get("data")
    # The last two parts: a file is often called train.jsonl.
    task = "/".join(Path(data).parts[-2:]) if data else None
    return f"Experts of {model or 'the model'}" + (f" on {task}" if task else "")


def _legend(metric: str, selection: Selection | None) -> str:
    text = f"colour: {_MEANING[metric]}"
    if selection is None:
        return text
    summary = selection.summary()
    text += f"; outlined: {summary.experts} selected experts"
    if summary.share_of_model is None:
        return text
    return f"{text}, {100 * summary.share_of_model:.1f} % of the model's parameters"

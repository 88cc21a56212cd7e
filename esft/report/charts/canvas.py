"""What every picture begins and ends with: a narrow figure, a legend below it, files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esft.report.chart import Chart
from esft.report.charts.style import INK, MUTED, SMALL, SURFACE, WIDTH, Line
from esft.report.charts.svg import drawing, to_svg
from esft.report.charts.table import Cell, to_csv
from esft.report.charts.text import clean, text_width, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HANDLE, _GAP, _EDGE = 0.34, 0.09, 0.08  # inches: a legend's line, beside it, around everything
_ROW = 0.19  # inches from line to line
_COLUMN_GAP = 0.18


@dataclass
class Canvas:
    """A picture while it is drawn.

    Attributes:
        figure: matplotlib's.
        name: of the chart.
        title: of the chart.
        legend: what the legend names, in the order in which it is read.
        rows: the numbers.
    """

    figure: Figure
    name: str
    title: str
    header: Sequence[str]
    legend: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def key(self, text: str, **look: Any) -> None:
        """Add an entry to the legend; `look` as of matplotlib's `Line2D`."""
        self.legend.append((clean(text), look))

    def line_key(self, text: str, line: Line) -> None:
        """Add a method to the legend."""
        self.key(text, **look(line))

    def chart(self, caption: str) -> Chart:
        """Place the legend under the picture and return both files.

        Args:
            caption: what is drawn, in which units, over which runs.
        """
        self._place_legend()
        title = clean(self.title)
        caption = caption[:1].upper() + caption[1:]
        svg = to_svg(self.figure, self.name, title, clean(caption))
        return Chart(self.name, title, caption, svg, to_csv(self.header, self.rows))

    def _place_legend(self) -> None:
        """Make the figure higher by the legend's rows, and draw these below the axes."""
        width, height = self.figure.get_size_inches()
        grid = _grid(self.legend, width)
        below = _ROW * sum(max(len(lines) for _, lines, _ in row) for row in grid)
        below += 1.5 * _EDGE if grid else 0.0
        total = height + below
        self.figure.set_size_inches(width, total)
        engine: Any = self.figure.get_layout_engine()
        engine.set(rect=(0, below / total, 1, 1 - below / total))
        top = below - _EDGE
        for row in grid:
            for left, lines, shown in row:
                self._entry(left, top, lines, shown)
            top -= _ROW * max(len(lines) for _, lines, _ in row)

    def _entry(self, left: float, top: float, lines: list[str], look: dict[str, Any]) -> None:
        from matplotlib.lines import Line2D

        inches = self.figure.dpi_scale_trans
        middle = top - _ROW / 2
        across = [left, left + _HANDLE / 2, left + _HANDLE]
        self.figure.add_artist(
            Line2D(across, [middle] * 3, transform=inches, **{"markevery": [1], **look})
        )
        for place, line in enumerate(lines):
            self.figure.text(
                left + _HANDLE + _GAP,
                middle - place * _ROW,
                line,
                transform=inches,
                fontsize=SMALL,
                va="center_baseline",
                color=INK,
            )


@contextmanager
def canvas(
    name: str,
    title: str,
    header: Sequence[str],
    *,
    height: float = 3.3,
    panels: int = 1,
    width: float = WIDTH,
) -> Iterator[tuple[Canvas, list[Axes]]]:
    """Yield a picture and its axes, one below the other.

    Args:
        name: of the chart, unique in a report.
        title: of the chart.
        header: the columns of its CSV.
        height: of all axes together, in inches; the legend comes on top of that.
        panels: how many axes, which share their x.
        width: in inches.
    """
    # Slow to import, and Figure without pyplot keeps no global state and needs no display.
    from matplotlib.figure import Figure

    with drawing(name):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        yield Canvas(figure, name, title, header), list(axes)


def look(line: Line) -> dict[str, Any]:
    """Return a method's line as keywords of matplotlib's `plot`."""
    return {
        "color": line.colour,
        "linestyle": line.style,
        "marker": line.marker,
        "markersize": line.size,
        # A rim in the colour of the ground keeps markers on one another apart.
        "markeredgecolor": SURFACE,
        "markeredgewidth": 0.6,
    }


def dot(line: Line) -> dict[str, Any]:
    """Return a method's marker alone, as keywords of matplotlib's `plot`."""
    return {**look(line), "linestyle": "none", "markersize": line.size + 3.0}


def name_axis(axes: Axes, text: str) -> None:
    """Write what goes upwards above the axis, where it can be read without turning the head."""
    axes.set_title(text, loc="left", fontsize=SMALL, color=INK, pad=6)


def base_line(axes: Axes, value: float) -> None:
    """Draw what the untrained model has as a line across; its name stands beside the axes."""
    axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        *("base", (1, value)),
        xycoords=axes.get_yaxis_transform(),
        xytext=(3, 0),
        textcoords="offset points",
        fontsize=SMALL,
        va="center",
        annotation_clip=False,
    )


def _grid(
    entries: list[tuple[str, dict[str, Any]]], width: float
) -> list[list[tuple[float, list[str], dict[str, Any]]]]:
    """Place a legend's entries in as many columns as fit: (left edge in inches, lines, look)."""
    room = width - 2 * _EDGE
    beside = _HANDLE + _GAP
    for columns in (4, 3, 2, 1):
        lines = [wrap(text, room - beside, SMALL) for text, _ in entries]
        widths = [
            max(beside + text_width(line, SMALL) for text in lines[at::columns] for line in text)
            for at in range(min(columns, len(entries)))
        ]
        if sum(widths) + _COLUMN_GAP * (len(widths) - 1) <= room or columns == 1:
            break
    lefts = [_EDGE + sum(widths[:at]) + at * _COLUMN_GAP for at in range(len(widths))]
    placed = [
        (lefts[place % columns], text, shown)
        for place, (text, (_, shown)) in enumerate(zip(lines, entries, strict=True))
    ]
    return [placed[at : at + columns] for at in range(0, len(placed), columns)]

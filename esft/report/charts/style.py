"""How all pictures look: colours for light and dark, markers and dashes of methods, letters.

The methods' colours keep a contrast of at least 3 to the ground (WCAG 2.2, 1.4.11), and no two
methods share a marker, so that print in grey and any colour vision tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 5.0  # inches; on a phone of 400 px a point is about a pixel
SIZE, SMALL = 10.0, 9.0  # of letters, in points

# Light colour of a role -> the same role on dark ground. The light one is what the SVG says, and
# what a viewer without style sheets shows.
INK, MUTED, GRID, SURFACE = "#1b1f24", "#57606a", "#d8dee4", "#ffffff"
ON_PALE, ON_STRONG = "#010409", "#fffffe"  # letters on cells; each colour stands for one role
OUTLINE = "#d55e00"
MISSING = "#dddddd"  # cells without a value
DARK = {
    INK: "#e6e9ec",
    MUTED: "#a3adb8",
    GRID: "#343b44",
    SURFACE: "#14181d",
    MISSING: "#3b424b",
    ON_PALE: "#f4f7fa",
    ON_STRONG: "#05070a",
}

_METHODS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("#0072b2", "#4aa8e8", "o", ()),
    (OUTLINE, "#ff8f45", "s", (5, 1.6)),
    ("#00805f", "#2fc79a", "^", (1.4, 1.4)),
    ("#b03a8c", "#f08bd0", "D", (7, 1.6, 1.4, 1.6)),
    ("#7a6100", "#d9bd3f", "v", ()),
    ("#4a4f57", "#c9d0d8", "P", (5, 1.6)),
    ("#8c1c24", "#ff7a80", "X", (1.4, 1.4)),
    ("#5b3fb5", "#ab9bff", "*", (7, 1.6, 1.4, 1.6)),
    ("#4f7d00", "#a5d64c", "p", (1.4, 1.4)),
    ("#2d8fc9", "#8fd3ff", "<", (5, 1.6)),
    ("#d6498f", "#ffb3d9", ">", (7, 1.6, 1.4, 1.6)),
    ("#a8693c", "#e0ae86", "h", ()),
)
DARK |= {light: dark for light, dark, _, _ in _METHODS}

# Points by which a marker must be larger than a circle to look as large.
_LARGER = {"*": 3.0, "P": 2.2, "X": 2.0, "p": 1.0, "h": 0.8, "D": -0.4}

# From nothing to all, and from less to more: lightness alone orders them.
BLUES = 24
CHANGES = 8  # levels on either side of no change


@dataclass(frozen=True)
class Line:
    """How a method is drawn, in all pictures of a report.

    Attributes:
        colour: on light ground.
        marker: matplotlib's name.
        dashes: lengths on and off, in line widths; empty for a full line.
    """

    colour: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def size(self) -> float:
        """Of the marker on a line, in points."""
        return 5.5 + _LARGER.get(self.marker, 0.6 if self.marker in "^v<>" else 0.0)

    @property
    def style(self) -> Any:
        """The dashes as matplotlib's `linestyle`."""
        return (0, self.dashes) if self.dashes else "-"


def line_styles(methods: Sequence[str]) -> dict[str, Line]:
    """Return each method's line: by its place among all of a report's methods.

    From the 13th on they repeat, each round with the next dashes.
    """
    dashes = [method[3] for method in _METHODS[:4]]
    found = {}
    for place, method in enumerate(methods):
        turn, index = divmod(place, len(_METHODS))
        colour, _, marker, own = _METHODS[index]
        pattern = dashes[(dashes.index(own) + turn) % len(dashes)]
        found[method] = Line(colour, marker, pattern)
    return found


def blues() -> list[str]:
    """Return `BLUES` colours from nearly none to much; `DARK` has their dark counterparts."""
    return [_mix("#f7fbff", "#6aaed6", "#08306b", part / (BLUES - 1)) for part in range(BLUES)]


def changes() -> list[str]:
    """Return 2 * `CHANGES` + 1 colours from much less through no change to much more."""
    steps = [part / CHANGES for part in range(1, CHANGES + 1)]
    less = [_mix("#f3f4f5", "#6aa0c9", "#0a3f78", step) for step in steps]
    more = [_mix("#f3f4f5", "#f0a35e", "#9c3d00", step) for step in steps]
    return [*reversed(less), "#f3f4f5", *more]


def _mix(start: str, middle: str, end: str, part: float, turn: float = 0.5) -> str:
    """Return the colour at `part` of the way, 0 to 1, through three colours; `middle` at `turn`."""
    first, second = (start, middle) if part < turn else (middle, end)
    place = part / turn if part < turn else (part - turn) / (1 - turn)
    channels = (
        round(int(first[at : at + 2], 16) * (1 - place) + int(second[at : at + 2], 16) * place)
        for at in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _dark_cells() -> dict[str, str]:
    steps = [part / CHANGES for part in range(1, CHANGES + 1)]
    less = [_mix("#22272e", "#2f6ea5", "#9fd0ff", step) for step in steps]
    more = [_mix("#22272e", "#a85a1c", "#ffc08a", step) for step in steps]
    # The turn is where letters change from one colour to the other, on light ground too.
    rising = [
        _mix("#1b2530", "#2f6ea5", "#cfe8ff", part / (BLUES - 1), turn=0.68)
        for part in range(BLUES)
    ]
    both = [*reversed(less), "#22272e", *more]
    return {
        **dict(zip(blues(), rising, strict=True)),
        **dict(zip(changes(), both, strict=True)),
    }


DARK |= _dark_cells()

# Everything that a user's matplotlibrc could change in a picture is set from matplotlib's own
# defaults first; see `esft.report.charts.svg.drawing`.
RC: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "axes.titlesize": SIZE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
}

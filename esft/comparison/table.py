"""A table of a report: what its cells say, apart from how a page or a text shows them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from esft.comparison.figures import Better, Unit

NOTHING = "–"
MARK = "†"  # behind what differs from the best, or from 0, by more than the spread
_BINARY = ("B", "kB", "MB", "GB", "TB")
_LARGE = ("", "k", "M", "G", "T", "P", "E", "Z")


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: its name in JSON, such as `exact_match/dates`.
        group: above several columns, such as `task score`.
        title: above this one, such as `dates`.
        unit: of its values.
        better: which way is good; None where neither is.
        signed: whether values are differences, shown with their sign.
    """

    key: str
    group: str
    title: str
    unit: Unit
    better: Better | None = None
    signed: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit and an arrow for what is good."""
        unit = {"score": "", "percent": "%", "nats": "nats"}.get(self.unit, "")
        arrow = {"higher": "↑", "lower": "↓", None: ""}[self.better]
        return " ".join(part for part in (self.title, f"({unit})" if unit else "", arrow) if part)

    def text(self, cell: Cell) -> str:
        """Return a cell as text: `94.7 ± 0.8`, without marks; `–` where there is no value."""
        if cell.value is None:
            return NOTHING
        value, spread = self._number(cell.value, self.signed), cell.spread
        # What a method trains and saves is often the same for every seed, and says so by itself.
        if spread is None or (spread == 0 and self.unit not in ("score", "nats")):
            return value
        return f"{value} ± {self._number(spread)}"

    def interval(self, cell: Cell) -> str:
        """Return a cell's confidence interval as text, or nothing if it has none."""
        if cell.low is None or cell.high is None:
            return ""
        return " to ".join(self._number(end, self.signed) for end in (cell.low, cell.high))

    def _number(self, value: float, signed: bool = False) -> str:
        sign = "+" if signed else ""
        if self.unit in ("score", "percent"):
            return f"{100 * value:{sign}.1f}"
        if self.unit == "nats":
            return f"{value:{sign}.3f}"
        if self.unit == "bytes":
            return _scaled(value, _BINARY, sign)
        if self.unit == "FLOPs":
            return _scaled(value, _LARGE, sign)
        if self.unit == "seconds":
            return f"{value:{sign}.3g} s" if abs(value) < 100 else f"{value:{sign},.0f} s"
        return f"{value:{sign},.0f}"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        value: a mean over seeds; None if it was not measured.
        spread: over the seeds, see `esft.comparison.statistics`; None of one seed, or of the base.
        count: how many seeds (or pairs) it is the mean of.
        best: whether no other method's mean in the column is better.
        differs: whether it differs from the best (in a table of differences: from 0) by more than
            the spread; None where that cannot be told.
        low, high: the 95 % confidence interval, of differences.
    """

    value: float | None = None
    spread: float | None = None
    count: int = 0
    best: bool = False
    differs: bool | None = None
    low: float | None = None
    high: float | None = None

    @property
    def mark(self) -> str:
        """What stands behind the cell's text."""
        return MARK if self.differs else ""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: at its left, a method or a pair of them.
        cells: one a column.
    """

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        key: its name in JSON and of its file.
        title: above it.
        columns: in order; those of a group stand together.
        rows: in order.
        notes: below it, a line each: what the figures are and what marks mean.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, int]]:
        """Return the headings above the columns, each with the number of columns below it."""
        found: list[tuple[str, int]] = []
        for column in self.columns:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found

    def cells(self, row: Row) -> Iterator[tuple[Column, Cell]]:
        """Yield a row's cells with their columns."""
        return zip(self.columns, row.cells, strict=True)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description: row -> column -> value, spread, count and the rest."""
        return {
            "title": self.title,
            "columns": {column.key: vars(column) for column in self.columns},
            "rows": {
                row.name: {column.key: vars(cell) for column, cell in self.cells(row)}
                for row in self.rows
            },
            "notes": list(self.notes),
        }


def _scaled(value: float, units: tuple[str, ...], sign: str) -> str:
    power = int(math.log(abs(value), 1000)) if abs(value) >= 1 else 0
    power = min(power, len(units) - 1)
    if abs(value) / 1000**power >= 999.5 and power < len(units) - 1:  # would print as 1e+03
        power += 1
    return f"{value / 1000**power:{sign}.3g} {units[power]}".rstrip()

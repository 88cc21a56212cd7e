"""A picture of a report: drawn as SVG, with the numbers in it as CSV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esft.files import write_text


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: of its files, such as `tradeoff-dates`.
        title: above it, a line.
        caption: below it: what is drawn, in which units, over which runs.
        svg: the picture, one `<svg>` element that needs nothing beside it; readable on light and
            dark ground.
        csv: the numbers in it, with a header line.
    """

    name: str
    title: str
    caption: str
    svg: str
    csv: str

    def write(self, folder: Path) -> None:
        """Write `<name>.svg` and `<name>.csv` into an existing folder."""
        write_text(folder / f"{self.name}.svg", self.svg)
        write_text(folder / f"{self.name}.csv", self.csv)

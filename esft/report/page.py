"""A report as what it says, whatever it is written as: sections of text, figures, tables, pictures.

`esft.report.html` and `esft.report.markdown` write it. All text here is plain: they escape it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from esft.report.chart import Chart

_PROSE = 24  # letters; what is longer is a sentence, which may go on in the next line
_UPRIGHT = 106  # letters across a sheet of paper
_NUMBER = re.compile(r"[-+−±<>≤≥~]?\s?\d")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of short statements."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and what they are: `[("model", "tiny-moe"), ...]`."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """A claim, and what the runs say of it.

    Attributes:
        claim: as it was stated before the runs.
        verdict: `held`, `did not hold`, ...: a word or a few.
        good: whether it held; None where that is open.
        evidence: the numbers that say so, a line each.
    """

    claim: str
    verdict: str
    good: bool | None
    evidence: Sequence[str]


@dataclass(frozen=True)
class Findings:
    """Claims, judged."""

    kind: ClassVar[str] = "findings"
    items: Sequence[Finding]


@dataclass(frozen=True)
class Cell:
    """A field of a table.

    Attributes:
        text: in it.
        best: whether it is the best of those that it stands among; bold.
        mark: a sign after the text, which the table's note explains.
        details: said smaller below the text, such as a confidence interval; a line each.
        href: where the text leads, relative to the report's folder, as part of an address.
    """

    text: str
    best: bool = False
    mark: str = ""
    details: Sequence[str] = ()
    href: str | None = None

    @property
    def breadth(self) -> int:
        """The letters that it needs side by side on paper, where a link's target is told."""
        lines = (f"{self.text}{self.mark}", *self.details)
        return min(max(map(len, lines)), _PROSE) + len(self.href or "")


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: what it tells, a line.
        columns: their heads.
        rows: as many cells each as there are columns.
        notes: what its numbers are and what marks mean.
        groups: heads above those of several columns, each with their number; the first stands
            above the rows' names. Empty if there are none.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    groups: Sequence[tuple[str, int]] = ()

    @property
    def wide(self) -> bool:
        """Whether it needs a sheet of paper turned; by its letters, so roughly."""
        columns = zip(*self.rows, strict=True)
        return sum(max(cell.breadth for cell in column) + 2 for column in columns) > _UPRIGHT

    @property
    def prose(self) -> list[bool]:
        """Per column, whether it holds sentences, which need room."""
        return [
            max((len(row[place].text) for row in self.rows), default=0) > _PROSE
            for place in range(len(self.columns))
        ]

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether it holds numbers, which are set flush right."""
        return [place > 0 and self._numbers(place) for place in range(len(self.columns))]

    def _numbers(self, place: int) -> bool:
        given = (row[place].text for row in self.rows)
        texts = [text for text in given if any(map(str.isalnum, text))]  # not a dash
        return all(_NUMBER.match(text) and ", " not in text for text in texts)


@dataclass(frozen=True)
class Pictures:
    """Charts that belong together; side by side where there is room."""

    kind: ClassVar[str] = "pictures"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Listing:
    """A file's text, word for word."""

    kind: ClassVar[str] = "listing"
    title: str
    text: str


Block = Text | Items | Facts | Findings | Table | Pictures | Listing


@dataclass(frozen=True)
class Section:
    """A part of a report with a heading of its own.

    Attributes:
        key: its anchor: letters, digits and hyphens.
        title: its heading.
        blocks: in order.
    """

    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        kind: what it reports on: `comparison`, `run` or `profile`.
        title: its heading.
        lead: what it is about, a sentence or two.
        sections: in order; those without a block are left out.
        made_by: the version that wrote it.
    """

    kind: str
    title: str
    lead: str
    sections: Sequence[Section]
    made_by: str = field(default="")

    def __post_init__(self) -> None:
        kept = [section for section in self.sections if section.blocks]
        object.__setattr__(self, "sections", kept)

    @property
    def charts(self) -> Iterator[Chart]:
        """Every picture in it."""
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Pictures):
                    yield from block.charts

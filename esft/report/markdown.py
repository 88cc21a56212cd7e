"""A report as Markdown, with the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from esft.report.page import (
    Block,
    Cell,
    Facts,
    Finding,
    Findings,
    Items,
    Listing,
    Page,
    Pictures,
    Table,
    Text,
)

# What would begin or end a construct within a line. `&` and `<` would begin an entity or a tag.
_ACTIVE = re.compile(r"([\\`*_\[\]|~$])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_AT_START = re.compile(r"^(\d*)(#|[+-](?=[\s+-]|$)|(?<=\d)[.)](?=\s|$))")


def page_markdown(page: Page) -> str:
    """Return a report as GitHub's Markdown, linking `figures/*.svg`; every text is escaped."""
    blocks = [f"# {escape(page.title)}", escape(page.lead)]
    for section in page.sections:
        blocks.append(f"## {escape(section.title)}")
        for block in section.blocks:
            blocks.extend(_written(block))
    blocks.append(f"Written by {escape(page.made_by)}.")
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """Return plain text as Markdown that shows it, in one line."""
    line = " ".join(text.split())
    for letter, entity in _ENTITIES.items():
        line = line.replace(letter, entity)
    line = _ACTIVE.sub(r"\\\1", line)
    return _AT_START.sub(r"\1\\\2", line)


def _written(block: Block) -> Iterator[str]:
    match block:
        case Text():
            yield escape(block.text)
        case Items():
            yield "\n".join(f"- {escape(item)}" for item in block.items)
        case Facts():
            rows = [[Cell(name), Cell(value)] for name, value in block.items]
            yield _grid(["", ""], rows, [False, False])
        case Findings():
            yield "\n".join(
                "\n  - ".join([_judged(found), *map(escape, found.evidence)])
                for found in block.items
            )
        case Table():
            yield f"**{escape(block.title)}**"
            yield _grid(_heads(block), block.rows, block.numeric)
            yield from map(escape, block.notes)
        case Pictures():
            for chart in block.charts:
                file = f"figures/{quote(chart.name)}"
                yield f"![{escape(chart.title)}]({file}.svg)"
                yield f"*{escape(chart.title)}.* {escape(chart.caption)} ([numbers]({file}.csv))"
        case Listing():
            yield f"**{escape(block.title)}**"
            yield _fenced(block.text)


def _judged(found: Finding) -> str:
    return f"- **{escape(found.verdict)}**: {escape(found.claim)}"


def _heads(table: Table) -> list[str]:
    """Return the columns' heads; Markdown has one row, so a group is told with its first."""
    heads = list(table.columns)
    place = 0
    for group, span in table.groups:
        if group:
            heads[place] = f"{group}: {heads[place]}"
        place += span
    return heads


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]], numeric: Sequence[bool]) -> str:
    lines = [
        [escape(column) for column in columns],
        ["---:" if right else "---" for right in numeric],
        *([_field(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _field(cell: Cell) -> str:
    text = escape(cell.text)
    if cell.href is not None:
        text = f"[{text}]({cell.href})"
    if cell.best:
        text = f"**{text}**"
    return " ".join((text + escape(cell.mark), *map(escape, cell.details)))


def _fenced(text: str) -> str:
    """Return text between fences longer than any in it."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"

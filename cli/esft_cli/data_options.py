"""Options of the commands that read a task set without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output

if TYPE_CHECKING:
    from esft.data.bad_rows import BadRows
    from esft.data.sources import Source

Data = Annotated[
    str,
    typer.Option(
        metavar="FILE|DIR|ID",
        help="The task set: .jsonl, .json, .csv or .parquet, a folder of them, or a hub id.",
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|DIR|ID",
        help="The task set: .jsonl, .json, .csv or .parquet, a folder of them, or a hub id.",
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Of the rows: auto, messages, prompt-completion, alpaca, sharegpt, text, tokenized.",
    ),
]
Split = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Split of a hub data set or of a folder: train, test, ..."),
]
Config = Annotated[
    str | None, typer.Option(metavar="NAME", help="Configuration of a hub data set.")
]
SkipBad = Annotated[
    int, typer.Option(metavar="N", help="Go on without up to N rows that cannot be used.")
]


def source(data: str, format_: str, split: str | None, config: str | None) -> Source:
    """Return the source that the options name."""
    from esft.data.sources import Source

    return Source(data, format=format_, split=split, config=config)  # type: ignore[arg-type]


def report_skipped(bad_rows: BadRows, file: Path | None = None) -> None:
    """List rows that were skipped: in a file and how many, or where there is none, on stderr."""
    if not bad_rows.skipped:
        return
    reporter = output.reporter()
    if file is None:
        for row in bad_rows.skipped:
            reporter.note(f"skipped {row['where']}: {row['reason']}")
    else:
        bad_rows.write(file)
        reporter.note(f"{bad_rows.counted()} skipped, listed in {file}")

"""`esft report PATH`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def report(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A comparison's folder, a run's, or scores of esft profile (or their folder).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default="PATH; beside a scores file, a folder called after it",
            help="Folder for the report; one that is there is replaced.",
        ),
    ] = None,
    selection: Annotated[
        Path | None,
        typer.Option(
            metavar="selection.json",
            help="With scores: the selection whose experts are outlined.",
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Make a page of what was measured: tables and pictures, in one file without a network.

    Writes report.html, the same as report.md, and every picture in figures/ as SVG and CSV.
    """
    import esft

    written = esft.write_report(path, out, selection=selection)
    if json:
        output.print_json(written.to_dict())
        return
    lines = (
        f"report on a {written.kind}: {written.html}",
        f"as Markdown: {written.markdown}",
        f"{written.pictures} pictures with their numbers: {written.figures}",
    )
    for line in lines:
        output.console().print(line, markup=False, soft_wrap=True)

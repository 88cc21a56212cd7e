"""`esft merge BASE DELTA --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The delta's base: a folder, a hub id, or tiny-moe.")
]
DeltaFolder = Annotated[Path, typer.Argument(metavar="DELTA", help="A run's delta folder.")]


def merge(
    base: Base,
    delta: DeltaFolder,
    out: Annotated[Path, typer.Option(help="Folder of the merged checkpoint; new.", metavar="DIR")],
    json: output.Json = False,
) -> None:
    """Fold a delta into its base: an ordinary checkpoint that needs no esft.

    The base's files are copied and only the changed bytes replaced, so memory stays small. A base
    that the delta was not made from is refused with exit code 3.
    """
    import esft

    merged = esft.merge(base, delta, out, reporter=output.reporter())
    if json:
        output.print_json({"merged": str(merged), "base": base, "delta": str(delta)})
        return
    output.console().print(f"merged checkpoint: {merged}", soft_wrap=True)

"""`esft merge BASE DELTA... --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The delta's base: a folder, a hub id, or tiny-moe.")
]
DeltaFolders = Annotated[
    list[Path], typer.Argument(metavar="DELTA...", help="Delta folders of runs, one or more.")
]
OnConflict = Annotated[
    str,
    typer.Option(
        metavar="error|last|mean",
        help="Where deltas change the same expert: refuse, let the last win, or average them.",
    ),
]


def merge(
    base: Base,
    deltas: DeltaFolders,
    out: Annotated[Path, typer.Option(help="Folder of the merged checkpoint; new.", metavar="DIR")],
    on_conflict: OnConflict = "error",
    json: output.Json = False,
) -> None:
    """Fold deltas into their base: an ordinary checkpoint that needs no esft.

    The base's files are copied and only the changed bytes replaced, so memory stays small. A base
    that a delta was not made from is refused with exit code 3.
    """
    import esft

    merged = esft.merge(base, deltas, out, on_conflict=on_conflict, reporter=output.reporter())
    if json:
        folders = [str(delta) for delta in deltas]
        output.print_json({"merged": str(merged), "base": base, "deltas": folders})
        return
    output.console().print(f"merged checkpoint: {merged}", soft_wrap=True)

"""`esft verify BASE DELTA... [--merged DIR]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output
from esft_cli.merge import Base, DeltaFolders, OnConflict


def verify(
    base: Base,
    deltas: DeltaFolders,
    merged: Annotated[
        Path | None, typer.Option(help="Also compare this merged checkpoint.", metavar="DIR")
    ] = None,
    on_conflict: OnConflict = "error",
    json: output.Json = False,
) -> None:
    """Check that deltas are whole and fit their base, and that a merge is exactly these.

    Every tensor is read and compared. A difference is named and ends with exit code 3.
    """
    import esft

    found = esft.verify(base, deltas, merged, on_conflict=on_conflict)
    if json:
        output.print_json({"ok": True, **vars(found)})
        return
    console = output.console()
    console.print(f"base: {found.tensors:,} tensors are those that the delta was made from")
    console.print(f"delta: undamaged; replaces {found.changed:,} tensors, whole or in part")
    if found.merged is not None:
        console.print(f"merged: {found.merged:,} tensors are exactly base and delta")

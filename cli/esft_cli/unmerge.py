"""`esft unmerge MERGED DELTA --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def unmerge(
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="A merged checkpoint.")],
    delta: Annotated[
        Path, typer.Argument(metavar="DELTA", help="The delta that was merged into it.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the base; new.", metavar="DIR")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="Has the replaced tensors; not needed if DELTA is compressed."
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Take a delta out of a merged checkpoint: the base's weights again, bit for bit.

    Every tensor's hash is compared with the base's; a difference is named, with exit code 3.
    """
    import esft

    written = esft.unmerge(merged, delta, out, base=base, reporter=output.reporter())
    if json:
        output.print_json({"base": str(written), "merged": str(merged), "delta": str(delta)})
        return
    output.console().print(f"base: {written}", soft_wrap=True)

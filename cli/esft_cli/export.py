"""`esft export DELTA --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def export(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="A delta's folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new.", metavar="DIR")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The delta's base: a folder, a hub id, or tiny-moe; needed to compress and to "
            "undo it.",
            metavar="BASE",
        ),
    ] = None,
    compress: Annotated[
        bool,
        typer.Option("--compress", help="Code the differences from the base, without loss."),
    ] = False,
    official: Annotated[
        bool,
        typer.Option("--official", help="Write an adapter of the official ESFT release."),
    ] = False,
    json: output.Json = False,
) -> None:
    """Write a delta once more: compressed for transport, or as an official ESFT adapter.

    Without an option it is written in the present format, which brings an older delta up to date
    and undoes --compress. `merge` and the other commands read a compressed delta as it is.
    """
    import esft

    found = esft.export(delta, out, base=base, compress=compress, official=official)
    if json:
        output.print_json(
            {**vars(found), "out": str(found.out), "bits_per_parameter": found.bits_per_parameter}
        )
        return
    output.console().print(
        f"{found.tensors:,} tensors, {found.parameters:,} parameters: "
        f"{output.size(found.bytes)}, {found.bits_per_parameter:.2f} bits a parameter "
        f"({output.size(found.plain_bytes)} as the base stores them)\nwritten to {out}",
        soft_wrap=True,
    )

"""`esft scores`: work with score files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output

app = typer.Typer(no_args_is_help=True)


@app.callback()
def scores() -> None:
    """Work with score files."""


@app.command("import")
def import_(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A folder of expert_weights_<layer>.txt, perhaps gzipped, or one such file.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="scores.json", help="Where to write the scores.")],
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Experts per token; the logs do not say it.")
    ] = 6,
    experts: Annotated[
        int | None,
        typer.Option(
            metavar="E",
            show_default="the highest one in the logs, plus 1",
            help="Experts per layer.",
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Turn the raw routing logs of the official ESFT code into scores."""
    from esft.routing_logs import import_logs

    imported = import_logs(path, top_k=top_k, experts=experts)
    imported.write(out)
    first = next(iter(imported.layers.values()))
    if json:
        output.print_json(
            {
                "out": str(out),
                "layers": sorted(imported.layers),
                "experts": first.experts,
                "top_k": first.top_k,
                "sample": imported.sample,
            }
        )
        return
    table = output.table("scores", "", "")
    for name, value in (
        ("layers", ", ".join(str(layer) for layer in imported.layers)),
        ("experts per layer", output.count(first.experts)),
        ("experts per token", output.count(first.top_k)),
        ("tokens", output.count(first.tokens)),
        ("written to", str(out)),
    ):
        table.add_row(name, value)
    output.console().print(table)

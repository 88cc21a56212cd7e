"""`esft import ADAPTER --base BASE --out DELTA`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def import_(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of an official ESFT adapter.")
    ],
    base: Annotated[
        str,
        typer.Option(
            help="The checkpoint it was trained from: a folder, a hub id, or tiny-moe.",
            metavar="BASE",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the delta; new.", metavar="DELTA")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Its configuration, which experts it holds.",
            metavar="expert_cfg.json",
            show_default="expert_cfg.json in the adapter's folder",
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Turn an adapter of the official ESFT release into a delta.

    Its tensors must be exactly those that its configuration names, in the base's dtype.
    """
    import esft

    delta = esft.import_official(adapter, base, out, config=config)
    experts = delta.manifest["selection"]["experts"]
    if json:
        output.print_json(
            {"delta": str(out), "tensors": len(delta.entries), "experts": experts, "base": base}
        )
        return
    count = sum(len(ids) for ids in experts.values())
    output.console().print(
        f"{len(delta.entries):,} tensors, {count:,} experts in {len(experts):,} layers\n"
        f"written to {out}",
        soft_wrap=True,
    )

"""`esft profile MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def profile(
    model: output.Model,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.jsonl",
            help="The task's training data: JSONL with prompt and completion, or messages.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="scores.json", help="Where to write the scores.")],
    tokens: Annotated[
        int, typer.Option(metavar="N", help="Size of the sample: rows are drawn up to N tokens.")
    ] = 131_072,
    seq_len: Annotated[
        int, typer.Option(metavar="N", help="Longer rows are cut to N tokens.")
    ] = 4096,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sample.")] = 0,
    count: Annotated[
        str,
        typer.Option(
            metavar="all|prompt|completion", help="Which tokens count; the model reads all."
        ),
    ] = "all",
    device: output.Device = None,
    dtype: output.Dtype = "auto",
    json: output.Json = False,
) -> None:
    """Score how much a task uses each expert of a model.

    Runs a sample of the data through the model, without training it. Next: esft select.
    """
    import esft
    from esft.files import refuse_unwritable

    refuse_unwritable(out)
    scores = esft.profile(
        model,
        data,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        count=count,
        device=device,
        dtype=dtype,
        reporter=output.reporter(),
    )
    scores.write(out)
    if json:
        facts = {"model": scores.model, "sample": scores.sample, "stability": scores.stability}
        output.print_json({"out": str(out), **facts})
        return
    table = output.table("scores", "", "")
    table.add_row("tokens counted", f"{output.count(scores.sample['tokens'])} ({count})")
    table.add_row("rows", output.count(scores.sample["sequences"]))
    table.add_row("MoE layers", output.count(len(scores.layers)))
    for metric in ("token", "gate"):
        table.add_row(
            f"stability, {metric}",
            f"{output.share(scores.stability.get(metric))} of the experts selected at p 0.2 stay "
            f"selected on half the sample",
        )
    table.add_row("written to", str(out))
    table.add_row("next", f"esft select {out} --out selection.json")
    output.console().print(table)

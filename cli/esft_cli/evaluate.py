"""`esft eval MODEL --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import data_options, output


def evaluate(
    model: output.Model,
    data: data_options.Data,
    delta: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A delta made from MODEL, to score with it.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(metavar="N", help="Score only the first N rows.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens at a time; fewer need less memory.")
    ] = 4096,
    format_: data_options.Format = "auto",
    split: data_options.Split = None,
    config: data_options.Config = None,
    skip_bad: data_options.SkipBad = 0,
    device: output.Device = None,
    dtype: output.Dtype = "auto",
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Score a model on a test set: exact match, loss, perplexity.

    Exact match is the share of rows that greedy decoding would answer token for token, end
    included; loss is the mean over answer tokens.
    """
    import esft
    from esft.data.bad_rows import BadRows

    bad_rows = BadRows(skip_bad)
    found = esft.evaluate(
        model,
        data_options.source(data, format_, split, config),
        delta=delta,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        max_rows=max_rows,
        bad_rows=bad_rows,
        reporter=output.reporter(),
    )
    data_options.report_skipped(bad_rows)
    if json:
        output.print_json(found.to_dict())
        return
    table = output.table("score", "", "")
    for name, value in (
        ("exact match", f"{output.share(found.exact_match)} ({found.matched:,} of {found.rows:,})"),
        ("loss", f"{found.loss:.4f} nats a token"),
        ("perplexity", f"{found.perplexity:.4g}"),
        ("answer tokens", output.count(found.tokens)),
    ):
        table.add_row(name, value)
    output.console().print(table)

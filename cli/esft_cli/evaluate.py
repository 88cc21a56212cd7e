"""`esft eval MODEL --data FILE`, or with tasks of the lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import data_options, output

if TYPE_CHECKING:
    from esft.measures.harness import HarnessScores


def evaluate(
    model: output.Model,
    data: data_options.OptionalData = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS", help="Instead of --data: tasks of lm-eval, with commas between them."
        ),
    ] = None,
    harness_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task files of your own for --harness.")
    ] = None,
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
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there, as JSON.")
    ] = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Score a model on a test set: exact match, loss, perplexity; or on tasks of lm-eval.

    Exact match is the share of rows that greedy decoding would answer token for token, end
    included; loss is the mean over answer tokens.
    """
    if (data is None) == (harness is None):
        raise typer.BadParameter("give --data or --harness, one of them", param_hint="--data")
    import esft
    from esft.data.bad_rows import BadRows
    from esft.files import write_json

    if harness is not None:
        from esft.measures.harness import evaluate_harness

        scores = evaluate_harness(
            model,
            [task.strip() for task in harness.split(",")],
            path=harness_path,
            delta=delta,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            max_rows=max_rows,
        )
        if out is not None:
            write_json(out, scores.to_dict())
        _print_harness(scores, json)
        return
    assert data is not None
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
    if out is not None:
        write_json(out, found.to_dict())
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


def _print_harness(scores: HarnessScores, json: bool) -> None:
    if json:
        output.print_json(scores.to_dict())
        return
    table = output.table(f"lm-eval {scores.harness}", "task", "metric", "value>", "±>", "rows>")
    for score in scores.scores:
        rows = output.count(scores.rows[score.task]) if score.task in scores.rows else ""
        figures = ("" if one is None else f"{one:.4f}" for one in (score.value, score.error))
        table.add_row(score.task, score.metric, *figures, rows)
    output.console().print(table)

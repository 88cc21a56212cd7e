"""`esft eval MODEL --data FILE`, or with tasks of the lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import data_options, offload_options, output

if TYPE_CHECKING:
    from esft.evaluating import Evaluated
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
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="exact_match, json_equal, chrf, bleu, rouge_l or pass_at_1; repeatable.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Of an answer at most, where a metric needs its text.")
    ] = 64,
    general: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also the loss on each file in DIR, another domain each."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every row's answer and scores there, as JSONL."),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Let pass_at_1 run code that the model writes."),
    ] = False,
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
    expert_memory: offload_options.Memory = None,
    expert_bits: offload_options.Bits = None,
    speculate: offload_options.Speculate = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures there, as JSON.")
    ] = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Score a model on a test set: exact match, other metrics, loss; or on tasks of lm-eval.

    Exact match is the share of rows that greedy decoding would answer token for token, end
    included; loss is the mean over answer tokens. Metrics have 95 % confidence intervals.
    """
    if (data is None) == (harness is None):
        raise typer.BadParameter("give --data or --harness, one of them", param_hint="--data")
    import esft
    from esft.data.bad_rows import BadRows
    from esft.files import write_json

    memory = offload_options.expert_memory(expert_memory, expert_bits, speculate)
    if harness is not None:
        if memory is not None:
            raise typer.BadParameter("not with --harness", param_hint="--expert-memory")
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
    bad_rows, reporter = BadRows(skip_bad), output.reporter()
    found = esft.evaluate(
        model,
        data_options.source(data, format_, split, config),
        delta=delta,
        metrics=metric or ["exact_match"],
        max_new_tokens=max_new_tokens,
        general=general,
        allow_code=allow_code,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        max_rows=max_rows,
        expert_memory=memory,
        bad_rows=bad_rows,
        reporter=reporter,
    )
    if memory is not None:
        reporter.note(memory.figures.summary())
    data_options.report_skipped(bad_rows)
    if out is not None:
        write_json(out, found.to_dict())
    if answers is not None:
        found.write_answers(answers)
    if json:
        output.print_json(found.to_dict())
        return
    _print(found)


def _print(found: Evaluated) -> None:
    table = output.table("score", "", "", "95 %")
    matched = f"({found.matched:,} of {found.rows:,})"
    rows = [("exact match", f"{output.share(found.exact_match)} {matched}", "")]
    for name, score in found.scores.items():
        if name == "exact_match":
            rows.pop(0)
        shown = f"{output.share(score.value)}{f' {matched}' if name == 'exact_match' else ''}"
        interval = f"{output.share(score.low)} to {output.share(score.high)}"
        rows.append((name.replace("_", " "), shown, interval))
    rows += [
        ("loss", f"{found.loss:.4f} nats a token", ""),
        ("perplexity", f"{found.perplexity:.4g}", ""),
        ("answer tokens", output.count(found.tokens), ""),
    ]
    if found.general:
        rows.append(("general loss", f"{found.general_loss:.4f} nats a token", ""))
        rows += [(f"  {name}", f"{loss:.4f}", "") for name, loss in found.general.items()]
    for row in rows:
        table.add_row(*row)
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

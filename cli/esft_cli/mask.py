"""`esft mask MODEL --data FILE --top N`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import data_options, output


def mask(
    model: output.Model,
    data: data_options.Data,
    top: Annotated[
        int, typer.Option(metavar="N", help="How many experts of each layer to switch off.")
    ],
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="scores.json",
            show_default="scored on the task set itself",
            help="Which experts are the best: scores from esft profile, on other rows.",
        ),
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="token|gate", help="Which scores; see esft select --metric.")
    ] = "token",
    draws: Annotated[
        int, typer.Option(metavar="N", help="How often random experts are switched off instead.")
    ] = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the first draw.")] = 0,
    delta: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A delta made from MODEL, to mask with it.")
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
    """Switch off a task's best experts, then random ones, and show what each costs.

    The routers choose among the other experts. The more the loss rises without the best ones, the
    less others can stand in for them.
    """
    import esft
    from esft.data.bad_rows import BadRows

    bad_rows = BadRows(skip_bad)
    found = esft.mask(
        model,
        data_options.source(data, format_, split, config),
        top=top,
        scores=scores,
        metric=metric,
        draws=draws,
        seed=seed,
        delta=delta,
        max_rows=max_rows,
        batch_tokens=batch_tokens,
        bad_rows=bad_rows,
        device=device,
        dtype=dtype,
        reporter=output.reporter(),
    )
    data_options.report_skipped(bad_rows)
    if json:
        output.print_json(found.to_dict())
        return
    table = output.table("", "experts switched off", "loss>", "more>", "exact match>")
    for name, score in (
        ("none", found.whole),
        (f"the {top} best of each layer", found.best),
        *((f"{top} at random, seed {seed + number}", x) for number, x in enumerate(found.random)),
    ):
        more = f"{score.loss - found.whole.loss:+.4f}"
        table.add_row(name, f"{score.loss:.4f}", more, output.share(score.exact_match))
    spread = "" if found.random_spread is None else f" +- {found.random_spread:.4f}"
    more = f"{found.random_loss - found.whole.loss:+.4f}"
    table.add_row(f"{top} at random, mean", f"{found.random_loss:.4f}{spread}", more, "")
    output.console().print(table)

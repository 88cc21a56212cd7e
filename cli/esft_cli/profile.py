"""`esft profile MODEL`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import data_options, output

if TYPE_CHECKING:
    from esft.scores import Scores


def profile(
    model: output.Model,
    data: data_options.Data,
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
    cooccurrence: Annotated[
        bool,
        typer.Option(
            "--cooccurrence",
            help="Also count how often two experts serve the same token, for esft select --group; "
            "takes time.",
        ),
    ] = False,
    format_: data_options.Format = "auto",
    split: data_options.Split = None,
    config: data_options.Config = None,
    skip_bad: data_options.SkipBad = 0,
    device: output.Device = None,
    dtype: output.Dtype = "auto",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read one layer after another from disk, to the same scores; by itself where the "
            "weights would not fit in memory.",
            show_default=False,
        ),
    ] = None,
    hidden_memory: Annotated[
        str | None,
        typer.Option(
            metavar="4GB",
            help="While streaming, what the sample may take in memory between two layers; the "
            "rest waits in a file. A quarter of what is free by itself.",
        ),
    ] = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Score how much a task uses each expert of a model.

    Runs a sample of the data through the model, without training it. Next: esft select.

    Launched by torchrun, several processes share the sample out.
    """
    import esft
    from esft.data.bad_rows import BadRows
    from esft.files import refuse_unwritable
    from esft.processes import as_one, is_main

    bad_rows = BadRows(skip_bad)
    with as_one("profile"):
        refuse_unwritable(out)
        scores = esft.profile(
            model,
            data_options.source(data, format_, split, config),
            tokens=tokens,
            seq_len=seq_len,
            seed=seed,
            count=count,
            cooccurrence=cooccurrence,
            bad_rows=bad_rows,
            device=device,
            dtype=dtype,
            stream=stream,
            hidden_memory=hidden_memory,
            out=out,
            reporter=output.reporter(),
        )
        if not is_main():
            return
        data_options.report_skipped(bad_rows, out.parent / "bad_rows.jsonl")
    if json:
        facts = {"model": scores.model, "sample": scores.sample, "stability": scores.stability}
        routing = {
            index: asdict(layer.routing)
            for index, layer in scores.layers.items()
            if layer.routing is not None
        }
        output.print_json({"out": str(out), **facts, "routing": routing})
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
    for name, text in _routing_rows(scores):
        table.add_row(name, text)
    table.add_row("written to", str(out))
    table.add_row("next", f"esft select {out} --out selection.json")
    output.console().print(table)


def _routing_rows(scores: Scores) -> Iterator[tuple[str, str]]:
    """Yield what the layers' routing is like: the lowest and the highest layer."""
    found = [layer.routing for layer in scores.layers.values() if layer.routing is not None]
    low, high = (pick(facts.entropy for facts in found) for pick in (min, max))
    yield "routing entropy", f"{low:.3f} to {high:.3f} of the layers' highest possible"
    low, high = (pick(facts.imbalance for facts in found) for pick in (min, max))
    yield "busiest expert", f"{low:.1f} to {high:.1f} times the mean load of its layer"
    for factor in ("1.25", "2"):
        low, high = (pick(facts.dropped[factor] for facts in found) for pick in (min, max))
        text = f"{output.share(low)} to {output.share(high)} of the choices would be dropped"
        yield f"capacity factor {factor}", text
    fixed = [facts.fixed_by_token for facts in found if facts.fixed_by_token is not None]
    if fixed:
        low, high = (pick(facts.share for facts in fixed) for pick in (min, max))
        chance = max(facts.without_id for facts in fixed)
        yield (
            "fixed by the token's id",
            f"{output.share(low)} to {output.share(high)} of the choices; without the id "
            f"{output.share(chance)} at most",
        )

"""`esft compare RECIPE --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output, recipe_options

if TYPE_CHECKING:
    from esft.comparison.records import Comparison
    from esft.comparison.spec import CompareRecipe
    from esft.reporting import Report


def compare(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe (.yaml), with a compare section.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for all runs and the report; goes on in it."),
    ],
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Compare these (compare.methods); see docs."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Seeds of the runs (compare.seeds).")
    ] = None,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,RATE",
            help="Tried with the first seed; the validation rows choose one a method "
            "(compare.learning_rates).",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="Also train with each of these values: p, rank, sample_tokens, top_n or group; "
            "repeatable.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Runs at a time.")] = 1,
    set_: recipe_options.Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which runs there would be, and stop.")
    ] = False,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Train a task by several methods: what does each cost and give, and would chance do?

    Every run is an ordinary run folder under DIR/runs; report.html has tables and pictures. Started
    once more, it trains only what is missing; a run that fails does not stop the rest.
    """
    import esft
    from esft.comparison.spec import as_compare_recipe, given_options

    asked = as_compare_recipe(
        recipe, [*(set_ or []), *given_options(methods, seeds, learning_rates, sweep or [])]
    )
    if dry_run:
        _print_plan(asked, json)
        return
    found = esft.compare(asked, out, jobs=jobs, reporter=output.reporter())
    report = esft.write_report(out)
    if json:
        output.print_json(found.to_dict())
    else:
        _print(found, report)


def _print_plan(asked: CompareRecipe, json: bool) -> None:
    from esft.comparing import planned

    plan = planned(asked)
    if json:
        output.print_json({kind: [run.folder for run in runs] for kind, runs in plan.items()})
        return
    table = output.table("runs", "", ">", "")
    purposes = {
        "grid": "with the first seed; they choose learning rates",
        "seeds": "with the other seeds, at the chosen rate",
        "sweep": "of sweeps",
    }
    for kind, runs in plan.items():
        table.add_row(kind, output.count(len(runs)), purposes[kind])
    output.console().print(table)
    for run in [run for runs in plan.values() for run in runs]:
        output.console().print(f"  {run.title}", soft_wrap=True)


def _print(found: Comparison, report: Report) -> None:
    from esft.comparison.summary import overview_table

    shown = overview_table(found)
    table = output.table(shown.title, "method", *(f"{each.heading}>" for each in shown.columns))
    for row in shown.rows:
        cells = [
            ("*" if cell.best else "") + column.text(cell) + cell.mark
            for column, cell in shown.cells(row)
        ]
        table.add_row(row.name, *cells)
    console = output.console()
    console.print(table)
    for note in shown.notes:
        console.print(note.replace("Bold:", "*:"), soft_wrap=True)
    failed = [run for run in found.records if run.error is not None]
    for run in failed:
        console.print(f"failed: {run.folder}: {run.error}", soft_wrap=True)
    console.print(f"\nreport: {report.html}", soft_wrap=True)

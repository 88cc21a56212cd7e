"""`esft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output

if TYPE_CHECKING:
    from esft.demo import DemoResult


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything; an earlier demo's is replaced.")
    ] = Path("demo"),
    task: Annotated[
        str | None, typer.Option(help="Another of the tasks that ship.", metavar="NAME")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", metavar="N", min=1)] = None,
    json: output.Json = False,
) -> None:
    """Specialise the tiny MoE that ships with esft to a task that it does not know.

    Runs every verb once, on real data, in about three minutes on two cores: profile, select,
    train, merge, verify, eval. Needs no download and no GPU.
    """
    from esft.demo import demo as run_demo

    options = {"task": task, "steps": steps}
    given = {name: value for name, value in options.items() if value is not None}
    result = run_demo(out, **given, reporter=output.reporter())  # type: ignore[arg-type]
    if json:
        output.print_json(result.to_dict())
        return
    _print(result)


def _print(result: DemoResult) -> None:
    before, after, run = result.before, result.after, result.run
    table = output.table(f"\ntiny-moe, specialised to {result.task}", "", "before>", "after>")
    table.add_row(
        "exact match",
        output.share(before.task.exact_match),
        output.share(after.task.exact_match),
    )
    table.add_row("loss on the task", f"{before.task.loss:.2f}", f"{after.task.loss:.2f}")
    table.add_row(
        "held-out loss elsewhere", f"{before.general_loss:.2f}", f"{after.general_loss:.2f}"
    )
    facts = output.table("", "", "")
    for name, value in (
        (
            "parameters trained",
            f"{output.count(run.trained)} ({output.share(result.share_of_experts)} of the "
            f"experts', {output.share(run.trained / run.total)} of the model)",
        ),
        ("delta", f"{run.delta} ({output.size(run.delta_bytes)})"),
        ("merged checkpoint", str(result.merged)),
        ("picture of the experts", str(result.heatmap)),
        ("everything", f"{result.folder}, {result.seconds:.0f} s"),
    ):
        facts.add_row(name, value)
    console = output.console()
    console.print(table)
    console.print(facts)
    console.print(
        "\nFor your own model and task (messages, prompt and completion, alpaca, text, ...):\n"
        "  esft inspect MODEL\n"
        "  esft train MODEL --data train.jsonl --metric token --p 0.2 --out RUN\n"
        "  esft merge MODEL RUN/delta --out MERGED",
        markup=False,
    )

"""`esft scores`: work with score files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output

app = typer.Typer(no_args_is_help=True)

_Metric = Annotated[
    str, typer.Option(metavar="token|gate", help="Which scores; see esft select --metric.")
]
_P = Annotated[
    float, typer.Option("--p", metavar="P", help="Select as esft select --p would, and compare.")
]


@app.callback()
def scores() -> None:
    """Work with score files: compare tasks, import the official logs."""


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


@app.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Scores of a task.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Scores of another, of the same model.")],
    metric: _Metric = "token",
    p: _P = 0.2,
    json: output.Json = False,
) -> None:
    """Show how far two tasks' scores are apart, layer by layer.

    Distance: the share of the routed mass that would have to go to other experts, 0 to 1. Ranks:
    Spearman's correlation. Then which experts a selection would gain and lose from A to B.
    """
    from esft.overlap import diff as compare
    from esft.scores import Scores

    found = compare(Scores.read(a), Scores.read(b), metric=metric, p=p)
    if json:
        output.print_json(found.to_dict())
        return
    table = output.table("", "layer>", "distance>", "ranks>", "overlap>", "only in B", "only in A")
    for layer, facts in found.layers.items():
        table.add_row(
            str(layer),
            f"{facts.distance:.3f}",
            _correlation(facts.rank_correlation),
            f"{facts.overlap:.2f}",
            _ids(facts.entered),
            _ids(facts.left),
        )
    table.add_row(
        "all",
        f"{found.distance:.3f}",
        _correlation(found.rank_correlation),
        f"{found.overlap:.2f}",
        output.count(sum(len(facts.entered) for facts in found.layers.values())),
        output.count(sum(len(facts.left) for facts in found.layers.values())),
    )
    output.console().print(table)


@app.command("overlap")
def overlap(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="A B ...", help="Scores of tasks, all of the same model."),
    ],
    metric: _Metric = "token",
    p: _P = 0.2,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw it, layer by layer too.")
    ] = None,
    json: output.Json = False,
) -> None:
    """Show which share of their experts tasks have in common.

    For each pair of tasks: experts selected for both / experts selected for either.
    """
    from esft.overlap import overlap as compare
    from esft.overlap import task_names
    from esft.scores import Scores

    names = task_names(files)
    tasks = {name: Scores.read(path) for name, path in zip(names, files, strict=True)}
    found = compare(tasks, metric=metric, p=p)
    if plot is not None:
        from esft.report.overlap_map import draw_overlap

        title = f"Experts that tasks share, selected at p = {p:g} of {metric}"
        draw_overlap(found, plot, title=title)
    if json:
        output.print_json(found.to_dict() | {"plot": plot and str(plot)})
        return
    table = output.table("", "task", "experts>", *(f"{name}>" for name in names))
    for name, experts, row in zip(names, found.experts, found.total, strict=True):
        table.add_row(name, output.count(experts), *(f"{share:.2f}" for share in row))
    output.console().print(table)
    if plot is not None:
        output.console().print(f"drawn to {plot}", markup=False)


def _correlation(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


def _ids(experts: list[int]) -> str:
    return ", ".join(map(str, experts)) or "-"

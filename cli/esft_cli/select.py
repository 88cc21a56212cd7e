"""`esft select SCORES`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esft_cli import output


def select(
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES", help="A file from esft profile, or one that the official code wrote."
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="selection.json", help="Where to write the selection.")
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="token|gate",
            show_default="token",
            help="How often tokens choose an expert, or the mean weight they give it.",
        ),
    ] = None,
    p: Annotated[
        str | None,
        typer.Option(
            "--p",
            metavar="P|auto",
            show_default="0.2",
            parser=output.number_or_auto,
            help="Per layer, take the best experts until their scores reach this share of the "
            "layer's; above 0, at most 1. auto: the smallest that is stable between the halves of "
            "the sample and reaches --cover.",
        ),
    ] = None,
    cover: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            show_default="0.2",
            help="With --p auto: how much of the scores on one half of the sample the experts "
            "chosen on the other must get.",
        ),
    ] = None,
    mass: Annotated[
        str | None,
        typer.Option(
            metavar="share|raw",
            show_default="share",
            help="What P is a part of: the layer's sum of scores, or 1.",
        ),
    ] = None,
    round: Annotated[
        int | None, typer.Option(metavar="N", help="Round the scores to N decimals first.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="official-token or official-gate: the official rule, exactly; fixes metric, p, "
            "mass and round.",
        ),
    ] = None,
    top_n: Annotated[
        int | None, typer.Option(metavar="N", help="Instead of --p: the best N experts a layer.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="5%|500MB|N",
            help="Instead of --p: the best experts of all layers that fit into a share of the "
            "model's parameters, bytes of delta, or N parameters.",
        ),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            metavar="2|4",
            help="With --p: select whole groups of experts that serve the same tokens; needs "
            "esft profile --cooccurrence.",
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="3-20,22", help="Select in these layers only.")
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            help="A control: as many experts per layer as the rule takes, drawn at random.",
        ),
    ] = None,
    random_from: Annotated[
        str | None,
        typer.Option(
            metavar="all|unselected",
            show_default="all",
            help="With --random: draw from the whole layer, or from what the rule leaves out.",
        ),
    ] = None,
    json: output.Json = False,
) -> None:
    """Choose the experts to train from a task's scores.

    Without options: in each layer the experts that get 20 % of the tokens. Next: esft train.
    """
    import esft

    selection = esft.select(
        esft.Scores.read(scores),
        metric=metric,
        p=p,
        cover=cover,
        mass=mass,
        round=round,
        top_n=top_n,
        budget=budget,
        group=group,
        layers=layers,
        random=random,
        random_from=random_from,
        preset=preset,
    )
    selection.write(out)
    summary = selection.summary()
    if json:
        output.print_json({"out": str(out), "rule": selection.rule, "summary": summary.to_dict()})
        return
    table = output.table("selection", "", "")
    for name, value in (
        ("layers", output.count(summary.layers)),
        (
            "experts per layer",
            f"{summary.fewest} at least, {summary.median:g} median, {summary.most} at most; "
            f"{output.count(summary.experts)} in all",
        ),
        ("parameters", output.count(summary.parameters)),
        ("share of the model", output.share(summary.share_of_model)),
        ("share of the experts", output.share(summary.share_of_experts)),
        ("size of the delta", output.size(summary.delta_bytes)),
        ("written to", str(out)),
    ):
        table.add_row(name, value)
    output.console().print(table)
    if "auto" in selection.rule:
        print(selection.rule["auto"]["why"])

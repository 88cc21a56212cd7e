"""`esft plan RECIPE` or `esft plan MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output, recipe_options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esft.plans.records import Case, Fit, Plan

_NO_DATA = "train.jsonl"  # what a plan for a model without data calls it


def plan(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE|MODEL", help="A recipe (.yaml), or a model by itself."),
    ],
    data: recipe_options.Data = None,
    method: Annotated[
        str | None, typer.Option(help="esft, random, lora, hot-lora or full.", metavar="NAME")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="Train this selection file's experts.", metavar="FILE")
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            help="Scores of the model's experts: what the recipe's rule selects under them.",
            metavar="FILE",
        ),
    ] = None,
    set_: recipe_options.Set = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Of the device, such as 80GB; says whether the run fits, and what would make it.",
            metavar="SIZE",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Of a run with several, one a device.", metavar="N")
    ] = 1,
    load_in: Annotated[
        str | None,
        typer.Option(
            help="4bit or 8bit: what transformers' loader would really quantise.", metavar="BITS"
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Take a few real steps here, and estimate the time.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu or cuda, what the run is to be on; it need not be here.", metavar="NAME"
        ),
    ] = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Say what training by a recipe will need: memory, disk, operations. Reads no weights.

    The run is rehearsed on tensors without content, so a model of any size is planned for on any
    machine; a folder with nothing but a config.json will do.
    """
    import esft
    from esft.recipe_text import Override

    options = {
        "--method": (("method",), method),
        "--selection": (("selection",), selection),
    }
    chosen: list[str | Override] = [
        Override(option, key, value)
        for option, (key, value) in options.items()
        if value is not None
    ]
    chosen += set_ or []
    if data is None and not recipe.endswith((".yaml", ".yml")):
        data = _NO_DATA
    found = esft.plan(
        recipe_options.resolved(recipe, data, chosen),
        scores=scores,
        device=device,
        memory=memory,
        processes=processes,
        load_in=load_in,
        probe=probe,
        reporter=output.reporter(),
    )
    if json:
        output.print_json(found.to_dict())
        return
    _print(found)


def _print(found: Plan) -> None:
    console = output.console()
    console.print(_model(found))
    _print_run(found)
    tables = {
        "without training": _inference(found),
        "several processes": _processes(found),
        "time": _time(found),
    }
    for name, rows in tables.items():
        if rows:
            table = output.table(f"\n{name}", "", "")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    if found.fit is not None:
        _print_fit(found.fit)
    if found.load_in is not None:
        asked = found.load_in
        console.print(
            f"\n{asked.bits}: {output.count(asked.quantised)} parameters would be quantised and "
            f"{output.count(asked.left)} stay in {asked.dtype}, "
            f"{output.count(asked.experts_left)} of them in routed experts: "
            f"{output.size(asked.bytes)} of weights, not {output.size(asked.expected)}",
            soft_wrap=True,
        )
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)


def _model(found: Plan) -> object:
    table = output.table(f"{found.model}", "", ">", ">")
    table.add_row("parameters", output.count(found.total), "")
    for kind, number in found.parameters.items():
        table.add_row(
            f"  {kind.replace('_', ' ')}", output.count(number), output.share(number / found.total)
        )
    table.add_row("weights on disk", output.size(found.stored.bytes), _dtypes(found))
    return table


def _dtypes(found: Plan) -> str:
    return ", ".join(found.stored.dtypes) + ("" if found.stored.measured else ", by the config")


def _print_run(found: Plan) -> None:
    cases = [found.many] if found.few is found.many else [found.few, found.many]
    words = (
        f"\n{found.method} on {found.device}, weights in {found.dtype}, {found.optimizer}; "
        f"{found.selection}\nbatch {found.batch.rows} x {found.batch.length} tokens"
        f"{f', {found.batch.accumulated} accumulated' if found.batch.accumulated > 1 else ''}, "
        f"{output.count(found.batch.labelled)} with a label; {found.batch.words}"
    )
    names = [""] if len(cases) == 1 else ["fewest experts", "most experts"]
    table = output.table("", "", *(f"{name}>" for name in names))
    for label, values in _rows(cases):
        table.add_row(label, *values)
    output.console().print(words, soft_wrap=True)
    output.console().print(table)


def _rows(cases: list[Case]) -> Iterator[tuple[str, list[str]]]:
    if any(case.experts for case in cases):
        yield "experts a layer", [_range(case) for case in cases]
    yield (
        "parameters trained",
        [f"{output.count(case.trained)} ({output.share(case.share)})" for case in cases],
    )
    memory = {
        "weights, frozen": "frozen",
        "weights, trained": "trained",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "copy of what trains": "start",
        "activations and the rest": "activations",
        "most while training": "training",
        "most while scoring experts": "profiling",
        "most while scoring rows": "evaluation",
        "peak memory": "peak",
    }
    for label, name in memory.items():
        values = [case.memory.to_dict()[name] for case in cases]
        if any(value != 0 for value in values):
            yield label, [output.size(value) for value in values]
    for label, name in (
        ("delta on disk", "delta"),
        ("a checkpoint", "checkpoint"),
        ("disk for the run", "total"),
        ("merged model, if wanted", "merged"),
    ):
        yield label, [output.size(case.disk.to_dict()[name]) for case in cases]
    yield (
        "operations a step",
        ["?" if case.flops is None else f"{case.flops / 1e12:,.2f} TFLOP" for case in cases],
    )


def _range(case: Case) -> str:
    return str(case.most) if case.fewest == case.most else f"{case.fewest} to {case.most}"


def _inference(found: Plan) -> list[tuple[str, str]]:
    model = found.inference
    least, usual = output.size(model.least), output.size(model.recommended)
    return [
        ("esft profile", output.size(model.profiling)),
        ("esft profile --stream", output.size(model.streaming)),
        ("  hidden states of these, or in a file", output.size(model.hidden)),
        ("esft eval", output.size(model.evaluation)),
        ("esft generate", output.size(model.generation)),
        (f"  --expert-memory {least}, the least", output.size(model.generation_least)),
        (f"  --expert-memory {usual}, recommended", output.size(model.generation_recommended)),
    ]


def _processes(found: Plan) -> list[tuple[str, str]]:
    several = found.processes
    if several is None:
        return []
    rows = [
        ("devices", str(several.count)),
        ("before training, each (the whole model)", output.size(several.loading)),
        ("data parallel, each", output.size(several.replicated)),
    ]
    if several.sharded is not None:
        rows.append(("sharded (FSDP2), each, while training", output.size(several.sharded)))
    if several.by_expert is not None:
        rows.append(("expert parallel, each", output.size(several.by_expert)))
    rows.append(("checkpoint, each machine reads", output.size(several.node)))
    if several.tokens_per_second is not None:
        rows.append(("tokens/s at best (no exchange counted)", f"{several.tokens_per_second:,.0f}"))
    return rows


def _time(found: Plan) -> list[tuple[str, str]]:
    probe = found.probe
    if probe is None:
        return []
    total = probe.total_seconds
    return [
        ("measured", f"{probe.layers} of {probe.of_layers} layers, {probe.seconds:.3g} s a step"),
        ("operations a second", f"{probe.flops_per_second / 1e9:,.1f} GFLOP"),
        ("a step", f"{probe.step_seconds:,.3g} s ({probe.tokens_per_second:,.0f} tokens/s)"),
        ("all steps", "?" if total is None else f"{total:,.0f} s"),
    ]


def _print_fit(found: Fit) -> None:
    console = output.console()
    console.print(f"\n{found.verdict}", soft_wrap=True)
    if found.streams is not None:
        how = "one layer at a time (--stream)" if found.streams else "with the model in memory"
        console.print(f"esft profile: {how}", soft_wrap=True)
    if not found.changes:
        return
    table = output.table("", "change, with those above", "--set", "peak>", "fits")
    before: dict[str, object] = {}
    for change in found.changes:
        own = {key: value for key, value in change.keys.items() if before.get(key) != value}
        table.add_row(
            change.words,
            "\n".join(f"{key}={value}" for key, value in own.items()),
            output.size(change.peak),
            "yes" if change.fits else "no",
        )
        before = dict(change.keys)
    console.print(table)

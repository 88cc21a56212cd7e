"""`esft train RECIPE` or `esft train MODEL --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esft_cli import output, recipe_options

if TYPE_CHECKING:
    from esft.run.result import RunResult


def train(
    recipe: recipe_options.RecipeOrModel,
    out: Annotated[Path, typer.Option(help="Folder of the run; new or empty.", metavar="RUN")],
    data: recipe_options.Data = None,
    eval_: recipe_options.Eval = None,
    test: recipe_options.Test = None,
    method: Annotated[
        str | None, typer.Option(help="esft, random, lora or full.", metavar="NAME")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(help="Train this selection file's experts.", metavar="FILE")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Select by token (TSR) or gate (AGS).", metavar="NAME")
    ] = None,
    p: Annotated[
        str | None,
        typer.Option(
            "--p",
            help="Select up to this cumulative share; auto finds it, as esft select does.",
            metavar="SHARE|auto",
            parser=output.number_or_auto,
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps (training.max_steps).", metavar="N")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate (training.learning_rate).", metavar="RATE")
    ] = None,
    set_: recipe_options.Set = None,
    skip_bad: Annotated[
        int | None,
        typer.Option(
            help="Go on without up to N rows that cannot be used, listed in bad_rows.jsonl "
            "(data.skip_bad).",
            metavar="N",
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic",
            help="Same bits each time on the same machine (deterministic: true).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN.")
    ] = False,
    device: output.Device = None,
    trust_remote_code: output.TrustRemoteCode = False,
    json: output.Json = False,
) -> None:
    """Train only the experts that a task uses, and save only what changed.

    Without a selection file the model is profiled on the training rows first. The training
    section of a recipe takes the fields of transformers' TrainingArguments by name; --set reaches
    each of them, as in --set training.per_device_train_batch_size=4.
    """
    import esft
    from esft import processes
    from esft.recipe_text import Override

    options = {
        "--method": (("method",), method),
        "--selection": (("selection",), selection),
        "--metric": (("selection", "metric"), metric),
        "--p": (("selection", "p"), p),
        "--steps": (("training", "max_steps"), steps),
        "--lr": (("training", "learning_rate"), lr),
        "--deterministic": (("deterministic",), deterministic),
        "--device": (("device",), device),
        "--eval": (("data", "eval"), eval_),
        "--test": (("data", "test"), test),
        "--skip-bad": (("data", "skip_bad"), skip_bad),
    }
    chosen: list[str | Override] = [
        Override(option, key, value)
        for option, (key, value) in options.items()
        if value is not None
    ]
    chosen += set_ or []
    with processes.joined():
        with processes.together("read the recipe"):
            resolved = recipe_options.resolved(recipe, data, chosen)
        result = esft.train(resolved, out, resume=resume, reporter=output.reporter())
        if not processes.is_main():
            return
    if json:
        output.print_json(result.to_dict())
        return
    _print(result, resolved.model)


def _tested(result: RunResult) -> dict[str, str]:
    rows = {}
    if result.test is not None:
        for name, score in result.test.scores.items():
            rows[f"{name.replace('_', ' ')} on data.test"] = (
                f"{output.share(score.value)} ({output.share(score.low)} to "
                f"{output.share(score.high)})"
            )
        rows["loss on data.test"] = f"{result.test.loss:.4f}"
    if result.general:
        rows["general loss"] = f"{sum(result.general.values()) / len(result.general):.4f}"
    return rows


def _print(result: RunResult, model: str) -> None:
    table = output.table(f"trained by {result.method}", "", "")
    moved, stored, drift = result.moved, result.stored_moved, result.drift
    scored = result.evaluation
    rows = {
        "steps": output.count(result.steps),
        "weights of step": str(result.best_step) if result.best_step is not None else None,
        "training loss": "?" if result.train_loss is None else f"{result.train_loss:.4f}",
        "time": f"{result.seconds:.0f} s ({result.tokens_per_second:,.0f} tokens/s)",
        "peak memory": output.size(result.peak_memory),
        "parameters trained": f"{output.count(result.trained)} "
        f"({output.share(result.trained / result.total)})",
        "moved while training": output.share(moved.share) if moved else None,
        "moved as stored": output.share(stored.share) if stored else None,
        "gate share of selected experts": (
            f"{output.share(drift.before)} before, {output.share(drift.after)} after"
            if drift
            else None
        ),
        "delta": f"{result.delta} ({output.size(result.delta_bytes)})",
        "exact match on data.eval": output.share(scored.exact_match) if scored else None,
        "loss on data.eval": f"{scored.loss:.4f}" if scored else None,
        **_tested(result),
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    console = output.console()
    console.print(table)
    console.print(f"\nnext: esft merge {model} {result.delta} --out MERGED", soft_wrap=True)

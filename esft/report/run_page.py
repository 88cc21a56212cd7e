"""The report of one run: what trained on what, what it scores, keeps and costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft.recipe_text import to_yaml
from esft.report.charts.progress import (
    general_loss,
    score_over_steps,
    training_loss,
    validation_loss,
)
from esft.report.charts.tradeoff import tradeoff
from esft.report.numerals import count, duration, share, size
from esft.report.page import Block, Cell, Facts, Listing, Page, Pictures, Section, Table, Text
from esft.report.profile_page import selection_blocks
from esft.report.run_charts import changed_routing, chosen_experts
from esft.report.run_folder import RunFolder

_NAMES = {"exact_match": "exact match"}


def run_page(run: RunFolder, made_by: str) -> Page:
    """Return the report of a run.

    Args:
        run: its folder, as read.
        made_by: the version that writes it.
    """
    recipe = run.recipe
    task = _task(recipe)
    return Page(
        kind="run",
        title=f"{recipe.get('model', 'A model')} trained by {recipe.get('method', 'esft')}"
        + (f" on {task}" if task else ""),
        lead=_lead(run),
        sections=[
            Section("outcome", "What came of it", _outcome(run)),
            Section(
                "learning", "While it learnt", [*_pictures(run, task or "task"), *_learning(run)]
            ),
            Section("cost", "What it cost", _cost(run)),
            Section("experts", "The experts that trained", _experts(run)),
            Section("recipe", "The recipe", [Listing("recipe.yaml", to_yaml(dict(recipe)))]),
        ],
        made_by=made_by,
    )


def _lead(run: RunFolder) -> str:
    if run.result is not None:
        return f"A finished run of {count(run.result['steps'])} steps; its folder: {run.path.name}."
    done = run.log[-1]["step"] if run.log else 0
    return (
        f"A run without a result: it has logged {count(done)} steps. The folder: {run.path.name}."
    )


def _outcome(run: RunFolder) -> list[Block]:
    blocks: list[Block] = []
    result = run.result
    if result is None:
        return [Text("There is no result.json: the run goes on, has failed, or was ended.")]
    if test := result.get("test"):
        blocks.append(_scores(test))
    if evaluation := result.get("evaluation"):
        facts = [
            ("rows", count(evaluation["rows"])),
            ("exact match", share(evaluation["exact_match"])),
            ("loss", f"{evaluation['loss']:.4f} nats a token"),
        ]
        blocks += [Text("On the validation rows (data.eval), after training:"), Facts(facts)]
    if general := result.get("general"):
        blocks.append(_general(run, general))
    return blocks or [Text("No rows were given to score the trained model on.")]


def _scores(test: Mapping[str, Any]) -> Table:
    rows = [
        [
            Cell(_NAMES.get(name, name)),
            Cell(share(score["value"])),
            Cell(f"{share(score['low'])} to {share(score['high'])}"),
        ]
        for name, score in test["scores"].items()
    ]
    rows.append([Cell("loss, nats a token"), Cell(f"{test['loss']:.4f}"), Cell("–")])
    notes = [
        f"Over {count(test['rows'])} rows; the intervals are 95 % bootstrap intervals over them."
    ]
    return Table("On the test rows (data.test)", ["score", "value", "95 % interval"], rows, notes)


def _general(run: RunFolder, general: Mapping[str, float]) -> Table:
    points = run.points
    before = points[0].general if points and points[0].step == 0 else {}
    known = bool(before)
    columns = ["domain", *(["before"] if known else []), "after", *(["change"] if known else [])]
    rows = []
    means = {"mean": sum(general.values()) / len(general)}
    for name, after in {**general, **means}.items():
        start = sum(before.values()) / len(before) if known and name == "mean" else before.get(name)
        cells = [Cell(name), Cell(f"{after:.4f}")]
        if known:
            cells.insert(1, Cell("–" if start is None else f"{start:.4f}"))
            cells.append(Cell("–" if start is None else f"{after - start:+.4f}"))
        rows.append(cells)
    notes = ["In nats a token, on text that the task does not teach; less is better."]
    return Table("Held-out loss of other domains", columns, rows, notes)


def _learning(run: RunFolder) -> list[Block]:
    points = run.points
    if not points:
        return []
    metrics = list(dict.fromkeys(name for point in points for name in point.scores))
    general = any(point.general for point in points)
    columns = ["step", "training", *(_NAMES.get(name, name) for name in metrics), "loss"]
    if general:
        columns.append("general loss")
    rows = []
    for point in points:
        cells = [Cell(count(point.step)), Cell(duration(point.seconds))]
        cells += [
            Cell(share(point.scores[name]) if name in point.scores else "–") for name in metrics
        ]
        cells.append(Cell(f"{point.loss:.4f}"))
        if general:
            cells.append(Cell(f"{point.general_loss:.4f}" if point.general else "–"))
        rows.append(cells)
    notes = [
        "On the validation rows; losses in nats a token. Training: its time, without evaluations."
    ]
    return [Table("Evaluations", columns, rows, notes)]


def _pictures(run: RunFolder, task: str) -> list[Block]:
    """Draw the run as a comparison of one method."""
    alone = run.as_comparison(task)
    losses = {alone.records[0].folder: dict(run.losses)}
    charts = [
        tradeoff(alone, task),
        score_over_steps(alone, task),
        training_loss(alone, task, losses),
        validation_loss(alone, task),
        general_loss(alone, task),
    ]
    drawn = [chart for chart in charts if chart is not None]
    return [Pictures(drawn)] if drawn else []


def _experts(run: RunFolder) -> list[Block]:
    drawn = [chosen_experts(run.path), *changed_routing(run.path)]
    pictures = [Pictures([chart for chart in drawn if chart is not None])] if any(drawn) else []
    return [*selection_blocks(run.selection, run.scores), *pictures]


def _cost(run: RunFolder) -> list[Block]:
    result = run.result
    if result is None:
        return []
    facts = [
        ("steps", count(result["steps"])),
        (
            "parameters trained",
            f"{count(result['trained'])} ({share(result['trained'] / result['total'])})",
        ),
        ("size of what is saved", size(result["delta_bytes"])),
        ("training", duration(result["seconds"])),
        ("a step", duration(result["step_seconds"]) if result.get("step_seconds") else None),
        ("speed", f"{count(result['tokens_per_second'])} tokens/s"),
        ("peak memory", size(result["peak_memory"])),
        ("weights of step", result.get("best_step")),
    ]
    if adapter := result.get("adapter"):
        facts.append(("LoRA", f"rank {adapter['r']}, alpha {adapter['alpha']}"))
    if moved := result.get("moved"):
        facts.append(("moved", f"{share(moved['share'])} of the trained parameters"))
    if drift := result.get("drift"):
        before, after = share(drift["before"]), share(drift["after"])
        facts.append(("gate share of the trained experts", f"{before} before, {after} after"))
    return [Facts([(name, str(value)) for name, value in facts if value is not None])]


def _task(recipe: Mapping[str, Any]) -> str:
    """Name the training data: the folder of a `train.jsonl`, or the file."""
    data = recipe.get("data")
    train = data.get("train") if isinstance(data, Mapping) else None
    first = train[0] if isinstance(train, list) and train else train
    path = first.get("path") if isinstance(first, Mapping) else first
    if not isinstance(path, str):
        return ""
    file = Path(path)
    return file.parent.name if file.stem == "train" else file.stem

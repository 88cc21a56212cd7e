"""The report of a profile: which experts a task uses, and which of them a selection takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft.layer_scores import METRICS
from esft.report.charts.experts import expert_map, selected_per_layer
from esft.report.numerals import count, share, size
from esft.report.page import Block, Cell, Facts, Page, Pictures, Section, Table
from esft.scores import Scores
from esft.selection import Selection

MEANINGS = {"token": "how often tokens choose it", "gate": "the weight that tokens give it"}
_COUNTED = {"all": "all tokens", "prompt": "tokens of prompts", "completion": "tokens of answers"}


def profile_page(scores: Scores, selection: Selection | None, made_by: str) -> Page:
    """Return the report of a profile.

    Args:
        scores: the profile.
        selection: experts to outline; of the same model.
        made_by: the version that writes it.

    Raises:
        SelectionError: the selection has a layer or an expert that the scores do not have.
    """
    if selection is not None:
        selection.check_against({index: layer.experts for index, layer in scores.layers.items()})
    model = scores.model.get("name") or "a model"
    maps = [
        expert_map(
            scores,
            name=f"experts-{metric}",
            title=f"Each expert's share of its layer by {meaning}",
            selection=selection,
            metric=metric,
        )
        for metric, meaning in MEANINGS.items()
    ]
    return Page(
        kind="profile",
        title=f"Experts of {model}" + _on(scores),
        lead="Which routed experts a task uses: a score for every expert of every layer, from one "
        "pass over a sample of the task's rows.",
        sections=[
            Section("profile", "What was profiled", [Facts(_about(scores))]),
            Section("selection", "The selection", selection_blocks(selection, scores)),
            Section("experts", "The experts", [Pictures(maps)]),
            Section("layers", "Layer by layer", [_layers(scores, selection)]),
        ],
        made_by=made_by,
    )


def selection_blocks(selection: Selection | None, scores: Scores | None) -> list[Block]:
    """Return what a report says of a selection; nothing if there is none.

    Args:
        selection: the experts that train.
        scores: of the same model, to tell how much of them the experts have.
    """
    if selection is None:
        return []
    facts = [("rule", _rule(selection.rule)), *_sizes(selection)]
    parts = {
        "shared experts": selection.shared_experts,
        "what is no expert": selection.non_expert_modules,
    }
    if also := [name for name, trains in parts.items() if trains]:
        facts.append(("also trains", ", ".join(also)))
    columns = ["layer", "experts, best first"]
    rows = [
        [Cell(str(layer)), Cell(", ".join(map(str, ids)))]
        for layer, ids in selection.experts.items()
    ]
    if scores is not None:
        metric = str(selection.rule.get("metric", "token"))
        columns.insert(1, f"share of the {metric} scores")
        for row, (layer, ids) in zip(rows, selection.experts.items(), strict=True):
            if layer in scores.layers:
                row.insert(1, Cell(share(_held(scores.layers[layer].metric(metric), ids))))
            else:
                row.insert(1, Cell("–"))
    picture = selected_per_layer(
        {"selected": selection.experts}, name="experts-per-layer", title="Selected experts by layer"
    )
    return [Facts(facts), Pictures([picture]), Table("Selected experts", columns, rows)]


def _on(scores: Scores) -> str:
    data = scores.sample.get("data")
    # The last two parts: a file is often called train.jsonl.
    return " on " + "/".join(Path(str(data)).parts[-2:]) if data else ""


def _about(scores: Scores) -> list[tuple[str, str]]:
    model, sample = scores.model, scores.sample
    found = [
        ("model", model.get("name")),
        ("architecture", model.get("architecture")),
        ("parameters", _count(model.get("parameters"))),
        ("in routed experts", _count(model.get("routed_parameters"))),
        ("data", sample.get("data")),
        ("counted", _COUNTED.get(str(sample.get("count")))),
        ("tokens", _count(sample.get("tokens"))),
        ("sequences", _count(sample.get("sequences"))),
        ("at most", sample.get("seq_len") and f"{count(sample['seq_len'])} tokens a sequence"),
        ("seed", sample.get("seed")),
    ]
    stable = [
        f"{share(scores.stability[name])} by {name}" for name in METRICS if name in scores.stability
    ]
    if stable:
        p = scores.stability.get("p")
        at = "" if p is None else f" at p = {p:g}"
        found.append(
            (
                "stability",
                f"of the experts selected{at}, {' and '.join(stable)} stay with half of the sample",
            )
        )
    return [(name, str(value)) for name, value in found if value is not None]


def _layers(scores: Scores, selection: Selection | None) -> Table:
    columns = ["layer", "experts", "top-k", "evenness", "busiest", "most chosen", "highest gate"]
    if selection is not None:
        columns += ["selected", "their TSR", "their AGS"]
    rows = []
    for index, layer in sorted(scores.layers.items()):
        routing = layer.routing
        row = [
            str(index),
            str(layer.experts),
            "–" if layer.top_k is None else str(layer.top_k),
            "–" if routing is None else f"{routing.entropy:.3f}",
            "–" if routing is None else f"{routing.imbalance:.2f} ×",
            *(_best(layer.metric(metric)) for metric in METRICS),
        ]
        if selection is not None:
            ids = selection.experts.get(index, [])
            row.append(str(len(ids)))
            row += [share(_held(layer.metric(metric), ids)) for metric in METRICS]
        rows.append([Cell(text) for text in row])
    notes = [
        "Evenness: entropy of the choices as a part of the highest possible; 1 is even. Busiest: "
        "how many times the mean load the busiest expert has. Shares are parts of a layer's sum.",
    ]
    return Table("Routing of each layer", columns, rows, notes)


def _best(scores: list[float]) -> str:
    best = max(range(len(scores)), key=lambda expert: scores[expert])
    return f"{share(_held(scores, [best]))} (expert {best})"


def _held(scores: list[float], ids: list[int]) -> float:
    """Return which share of a layer's scores some experts have."""
    total = sum(scores)
    return sum(scores[expert] for expert in ids) / total if total else 0.0


def _rule(rule: Mapping[str, Any]) -> str:
    if not rule:
        return "an explicit list"
    shown = {key: value for key, value in rule.items() if value is not None and key != "auto"}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())


def _sizes(selection: Selection) -> list[tuple[str, str]]:
    summary = selection.summary()
    spread = f"{summary.fewest} to {summary.most}, median {summary.median:g}"
    if summary.fewest == summary.most:
        spread = str(summary.most)
    facts = [
        ("experts", f"{count(summary.experts)} in {summary.layers} layers"),
        ("a layer", spread),
    ]
    if summary.parameters is not None:
        facts.append(("parameters", count(summary.parameters)))
    if summary.share_of_model is not None:
        facts.append(("of the model", share(summary.share_of_model)))
    if summary.share_of_experts is not None:
        facts.append(("of the experts", share(summary.share_of_experts)))
    if summary.delta_bytes is not None:
        facts.append(("size of the delta", size(summary.delta_bytes)))
    return facts


def _count(number: Any) -> str | None:
    return None if number is None else count(number)

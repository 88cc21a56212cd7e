"""Folders to report on: a comparison's, a run's, a profile's; with names that attack a page."""

from __future__ import annotations

import json
from pathlib import Path

from esft.comparison.records import Comparison
from esft.files import write_json
from esft.layer_scores import LayerScores
from esft.run.folder import (
    METRICS,
    RECIPE,
    RESULT,
    ROUTING_AFTER,
    ROUTING_BEFORE,
    SCORES,
    SELECTION,
)
from esft.scores import UNKNOWN_MODEL, Scores
from esft.selection import Selection, select
from tests.comparisons import comparison

HOSTILE = "<script>document.title='owned'</script>"
HOSTILE_IMAGE = '"><img src=x onerror="document.title=1">&amp;'
LAYERS, EXPERTS = 4, 16


def scores(model: str = "tiny-moe", data: str = "tasks/dates/train.jsonl") -> Scores:
    """Return made-up scores; each layer favours other experts."""
    layers = {}
    for layer in range(1, LAYERS + 1):
        weights = [1 + (expert * (layer + 2) * 7) % 13 for expert in range(EXPERTS)]
        token = [weight / sum(weights) for weight in weights]
        layers[layer] = LayerScores(EXPERTS, 4, 1000, token, [0.8 * share for share in token])
    described = {**UNKNOWN_MODEL, "name": model, "parameters": 100_000, "expert_parameters": 300}
    described |= {"routed_parameters": 19_200, "bytes_per_parameter": 2}
    sample = {"data": data, "count": "all", "tokens": 1000, "sequences": 10, "seq_len": 128}
    return Scores(layers, described, sample, {"p": 0.2, "token": 0.9, "gate": 1.0})


def selection(of: Scores | None = None) -> Selection:
    """Return the selection that a run makes of `scores()`."""
    return select(of or scores(), metric="token", p=0.3)


def save_profile(folder: Path, *, hostile: bool = False) -> Path:
    """Write scores and a selection of them."""
    found = scores(HOSTILE, HOSTILE_IMAGE) if hostile else scores()
    found.write(folder / SCORES)
    selection(found).write(folder / SELECTION)
    return folder


def save_run(folder: Path, *, ended: bool = True, hostile: bool = False) -> Path:
    """Write what a run leaves in its folder: three evaluations, six losses; hostile, none."""
    save_profile(folder, hostile=hostile)
    for name in (ROUTING_BEFORE, ROUTING_AFTER):
        scores().write(folder / name)
    name = json.dumps(HOSTILE if hostile else "tiny-moe")
    data = json.dumps(f"/data/{HOSTILE_IMAGE if hostile else 'dates'}/train.jsonl")
    (folder / RECIPE).write_text(
        f"model: {name}\nmethod: esft\nselection: {{metric: token, p: 0.3}}\n"
        f"data: {{train: {data}, eval: {data}}}\n"
        f"evaluation: {{metrics: [exact_match, chrf]}}\ntraining: {{learning_rate: 1.0e-3}}\n"
    )
    lines = []
    for step in (0, 20, 40):
        general = {"english": 1.0 + step / 400, "code": 0.8 + step / 800}
        evaluation = {"eval_loss": 2.0 - step / 25, "eval_exact_match": step / 50}
        evaluation |= {"eval_chrf": 0.2 + step / 60, "eval_perplexity": 2.0}
        evaluation |= {f"eval_general_{name}_loss": loss for name, loss in general.items()}
        evaluation["eval_general_loss"] = sum(general.values()) / 2
        lines.append({"step": step, **evaluation, "seconds": step / 3, "train_seconds": step / 4})
    lines += [{"step": step, "loss": 3 / step, "seconds": 1.0} for step in (5, 10, 20, 25, 30, 40)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not hostile:
        (folder / METRICS).write_text(text)
    if ended:
        write_json(folder / RESULT, _result())
    return folder


def save_comparison(folder: Path, *, hostile: bool = False) -> Comparison:
    """Write a comparison: of two tasks, each run with a folder, one of them with its files."""
    if hostile:
        made = comparison([HOSTILE], ["esft-token", HOSTILE_IMAGE, "full"], evaluations=2)
    else:
        methods = ["esft-token", "random", "lora", "full"]
        made = comparison(["dates", "sums"], methods, sweeps={"p": [0.1, 0.2]}, evaluations=4)
        for record in made.records:
            (folder / record.folder).mkdir(parents=True, exist_ok=True)
        save_run(folder / made.of("dates", "esft-token")[0].folder)
    made.write(folder)
    return made


def _result() -> dict[str, object]:
    score = {"value": 0.8, "low": 0.75, "high": 0.85}
    return {
        "method": "esft",
        "steps": 40,
        "best_step": None,
        "seconds": 130.0,
        "step_seconds": 3.2,
        "tokens_per_second": 1234.5,
        "train_loss": 0.3,
        "trained": 6000,
        "total": 100_000,
        "moved": {"share": 0.98},
        "drift": {"before": 0.3, "after": 0.35},
        "delta_bytes": 12_000,
        "peak_memory": 400_000_000,
        "evaluation": {"rows": 50, "exact_match": 0.8, "loss": 0.4},
        "test": {"scores": {"exact_match": score, "chrf": score}, "loss": 0.41, "rows": 300},
        "general": {"english": 1.1, "code": 0.85},
    }

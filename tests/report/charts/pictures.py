"""Every picture that there is, drawn of a comparison or of made-up scores."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from typing import Any

from esft.comparison.records import Comparison
from esft.overlap import overlap
from esft.report.chart import Chart
from esft.report.charts import ends, experts, overlaps, progress, routing, sweeps, tradeoff
from esft.scores import LayerScores, Scores
from esft.selection import select


def of_comparison(comparison: Comparison, task: str) -> Iterator[Chart | None]:
    """Draw what can be drawn of one task; None for what there is nothing of."""
    losses = {
        run.folder: {10 * place: 3.0 / (1 + place) for place in range(5)}
        for run in comparison.records
    }
    yield tradeoff.tradeoff(comparison, task)
    yield ends.score_against_bytes(comparison, task)
    yield ends.general_against_score(comparison, task)
    yield progress.score_over_steps(comparison, task)
    yield progress.validation_loss(comparison, task)
    yield progress.general_loss(comparison, task)
    yield progress.training_loss(comparison, task, losses)
    yield sweeps.learning_rates(comparison, task)
    for key in sweeps.swept_keys(comparison):
        yield sweeps.sweep(comparison, task, key)
    yield experts.experts_per_layer(comparison, task)
    yield routing.routing_of_methods(comparison, task)


def of_scores() -> Iterator[Chart]:
    """Draw what shows scores and selections."""
    before, after = made_scores(0), made_scores(1)
    chosen = select(before, p=0.4)
    yield experts.expert_map(before, name="experts", title="Experts", selection=chosen)
    yield experts.expert_map(before, name="plain", title="Experts", metric="gate")
    yield experts.selected_per_layer({"a": chosen.experts}, name="selected", title="Selected")
    yield routing.routing_change(
        before, after, name="change", title="Change", selection=chosen, metric="token"
    )
    yield routing.selected_share(before, after, chosen, name="share", title="Share")
    tasks = {"dates": before, "a long name of a task": after, "sums": made_scores(2)}
    yield overlaps.overlap_map(overlap(tasks, p=0.4), name="overlap", title="Overlap")


def made_scores(seed: int, experts: int = 8, layers: int = 4) -> Scores:
    """Return uneven scores; the last layer has fewer experts."""
    chance = random.Random(seed)
    found = {}
    for layer in range(1, layers + 1):
        count = experts - 2 * (layer == layers)
        rows = [[chance.expovariate(1) ** 2 for _ in range(count)] for _ in range(2)]
        token, gate = ([value / sum(row) for value in row] for row in rows)
        found[layer] = LayerScores(count, 2, 100, token, gate)
    return Scores(found, sample={"tokens": 100})


def numbers(chart: Chart) -> list[dict[str, Any]]:
    """Return the rows of a chart's CSV, numbers as such."""
    return [
        {key: _number(value) for key, value in row.items()}
        for row in csv.DictReader(io.StringIO(chart.csv))
    ]


def _number(text: str) -> int | float | str | None:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text or None

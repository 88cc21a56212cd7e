"""Made-up comparisons: plausible curves, failed and unfinished runs, sweeps."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from esft.comparison.records import Comparison, Interval, Outcome, Point, RunRecord

TASKS = ["dates", "json", "sums"]
METHODS = ["esft-token", "esft-gate", "random", "lora", "hot-lora", "full"]
SEEDS = [0, 1, 2]
DOMAINS = ["english", "code", "lists"]
LAYERS, EXPERTS = 8, 32
TOTAL = 5_100_000

# Best score, how fast it is learnt, how much is forgotten, parameters that train.
_CHARACTER: dict[str, tuple[float, float, float, int]] = {
    "esft-token": (0.93, 1.3, 0.06, 199_680),
    "esft-gate": (0.91, 1.2, 0.055, 187_392),
    "random": (0.78, 0.8, 0.09, 199_680),
    "lora": (0.85, 0.9, 0.14, 260_000),
    "hot-lora": (0.83, 0.8, 0.08, 41_000),
    "full": (0.95, 1.6, 0.32, TOTAL),
}
_LEARNING_RATES = [1e-4, 3e-4]


def comparison(
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = SEEDS,
    *,
    domains: Sequence[str] = DOMAINS,
    evaluations: int = 8,
    failures: bool = True,
    sweeps: Mapping[str, Sequence[float]] | None = None,
    metric: str = "exact_match",
) -> Comparison:
    """Return a comparison, the same for the same arguments.

    Args:
        tasks: names.
        methods: names; those that are not in `METHODS` get a character by chance.
        seeds: of the runs.
        domains: of the general loss; none: nothing general was measured.
        evaluations: points of a run after step 0; 0: not one point.
        failures: whether a run of the last method failed, one has not ended, and one method
            failed with every seed on the last task (where there is more than one task).
        sweeps: key -> values, of the first method, on the first task.
        metric: the task's.
    """
    base = {
        task: Point(0, 0.0, {metric: 0.02}, 2.4, {domain: 1.0 + _at(domain) for domain in domains})
        for task in tasks
    }
    records = [
        _run(task, method, rate, seed, base[task], evaluations, metric)
        for task in tasks
        for method in methods
        for rate in _LEARNING_RATES
        for seed in seeds
    ]
    for key, values in (sweeps or {}).items():
        largest = max(values)
        for value in values:
            for seed in seeds:
                given = {key: value}
                records.append(
                    _run(
                        *(tasks[0], methods[0], _LEARNING_RATES[0], seed, base[tasks[0]]),
                        *(evaluations, metric, given, value / largest),
                    )
                )
    if failures:
        records = [_broken(record, tasks, methods, seeds) for record in records]
    return Comparison(
        model="tiny-moe",
        tasks=list(tasks),
        methods=list(methods),
        seeds=list(seeds),
        metric=metric,
        base=base,
        records=records,
        recipe={
            "model": "tiny-moe",
            "compare": {"tasks": list(tasks), "methods": list(methods), "seeds": list(seeds)},
        },
        versions={"esft": "0.1.0", "torch": "2.13.0", "machine": "2 cores"},
    )


def _run(
    task: str,
    method: str,
    rate: float,
    seed: int,
    base: Point,
    evaluations: int,
    metric: str,
    sweep: Mapping[str, float] | None = None,
    size: float = 1.0,
) -> RunRecord:
    chance = random.Random(f"{task} {method} {rate} {seed} {dict(sweep or {})}")
    best, speed, forgets, trained = _CHARACTER.get(method) or _character(method)
    chosen = rate == _LEARNING_RATES[0]
    best = (best - 0.1 * _at(task)) * (1 if chosen else 0.9) * (0.6 + 0.4 * size)
    best += chance.gauss(0, 0.012)
    forgets = forgets * (1 if chosen else 1.7) * (0.5 + 0.5 * size) * chance.uniform(0.85, 1.15)
    points = [base] if evaluations else []
    for place in range(1, evaluations + 1):
        done = place / evaluations
        learnt = 1 / (1 + math.exp(-8 * speed * (done - 0.35)))
        score = base.scores[metric] + (best - base.scores[metric]) * learnt
        points.append(
            Point(
                step=25 * place,
                seconds=12.5 * place / speed,
                scores={metric: min(1.0, max(0.0, score + chance.gauss(0, 0.008)))},
                loss=0.05 + 2.35 * math.exp(-4 * speed * done) * chance.uniform(0.95, 1.05),
                general={
                    domain: loss + forgets * done**1.3 * (0.6 + _at(domain))
                    for domain, loss in base.general.items()
                },
            )
        )
    last = points[-1] if points else base
    score = min(1.0, max(0.0, last.scores[metric] + chance.gauss(0, 0.01)))
    trained = round(trained * size)
    value = "".join(f"/{key}-{number:g}" for key, number in (sweep or {}).items())
    return RunRecord(
        task=task,
        method=method,
        learning_rate=rate,
        seed=seed,
        folder=f"runs/{task}/{method}{value}/lr-{rate:g}/seed-{seed}",
        sweep=dict(sweep or {}),
        chosen=chosen,
        points=points,
        outcome=Outcome(
            scores={metric: Interval(score, max(0.0, score - 0.03), min(1.0, score + 0.03))},
            loss=last.loss + 0.01,
            general=dict(last.general),
            trained=trained,
            total=TOTAL,
            delta_bytes=2 * trained,
            steps=25 * evaluations,
            seconds=12.5 * evaluations / speed,
            step_seconds=0.5 / speed,
            tokens_per_second=900.0 * speed,
            peak_memory=400_000_000 + 12 * trained,
            flops=6.0e12 * (0.3 + trained / TOTAL),
            selection=_selection(method, chance),
            drift=_drift(chance) if _selects(method) else None,
        ),
    )


def _broken(
    record: RunRecord, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> RunRecord:
    """Return the record, or what it would be had the run failed or not ended."""
    here = (record.task, record.method)
    fields: dict[str, Any] = {**vars(record)}
    if record.sweep:
        return record
    if here == (tasks[0], methods[-1]) and record.seed == seeds[-1] and len(seeds) > 1:
        message = "out of memory: 3.1 GB needed, 2.0 GB free"
        fields.update(outcome=None, error=message, points=record.points[:2])
    elif len(tasks) > 1 and here == (tasks[-1], methods[len(methods) // 2]):
        fields.update(outcome=None, error="the loss is not a number <at step 3>", points=[])
    elif len(tasks) > 1 and here == (tasks[1], methods[0]) and record.seed == seeds[-1]:
        fields.update(outcome=None, points=record.points[:-1])  # still running
    return RunRecord(**fields)


def _at(name: str) -> float:
    """Return a number of a name, 0 to 1."""
    return random.Random(name).random()


def _character(method: str) -> tuple[float, float, float, int]:
    chance = random.Random(method)
    best, speed = chance.uniform(0.6, 0.97), chance.uniform(0.7, 1.6)
    return best, speed, chance.uniform(0.03, 0.35), chance.randrange(20_000, 800_000)


def _selects(method: str) -> bool:
    return method not in ("lora", "full")


def _selection(method: str, chance: random.Random) -> dict[int, list[int]] | None:
    if not _selects(method):
        return None
    return {
        layer: chance.sample(range(EXPERTS), chance.randint(1, EXPERTS // 4))
        for layer in range(1, LAYERS + 1)
    }


def _drift(chance: random.Random) -> dict[str, Any]:
    before = chance.uniform(0.2, 0.4)
    largest = {"layer": 3, "expert": 7, "before": 0.1, "after": 0.16}
    return {
        "tokens": 4096,
        "seconds": 1.5,
        "before": before,
        "after": before + chance.uniform(0, 0.15),
        "mean": 0.01,
        "largest": largest,
    }

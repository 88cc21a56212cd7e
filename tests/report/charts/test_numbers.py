"""The numbers beside a picture are those of the runs, read and averaged here once more by loops."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from esft.comparison.records import Comparison, RunRecord
from esft.errors import DataError
from esft.overlap import overlap
from esft.report.chart import Chart
from esft.report.charts import ends, experts, overlaps, progress, routing, sweeps, tradeoff
from esft.report.charts.logged import logged
from esft.selection import select
from tests.comparisons import comparison
from tests.report.charts.pictures import made_scores, numbers

MADE = comparison(["dates", "sums"], sweeps={"p": [0.1, 0.4]}, evaluations=3)
METRIC = "exact_match"


def counted(made: Comparison, task: str, method: str) -> list[RunRecord]:
    return [
        run
        for run in made.records
        if run.task == task
        and run.method == method
        and run.chosen
        and not run.sweep
        and run.outcome is not None
    ]


def rows(chart: Chart | None) -> list[dict[str, Any]]:
    assert chart is not None
    return numbers(chart)


def by_step(task: str, read: Any) -> list[tuple[Any, ...]]:
    """Return (method, seed or `mean`, step, values...) of all evaluations."""
    found = []
    for method in MADE.methods:
        runs = counted(MADE, task, method)
        for run in runs:
            for point in run.points:
                found.append((method, run.seed, point.step, *read(point)))
        for place, point in enumerate(runs[0].points if runs else []):
            several = [read(run.points[place]) for run in runs]
            means = [statistics.fmean(values) for values in zip(*several, strict=True)]
            found.append((method, "mean", point.step, *means))
    return found


def same(found: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]]) -> None:
    assert len(found) == len(wanted)

    def key(row: tuple[Any, ...]) -> str:
        return repr(row[:3])

    for one, other in zip(sorted(found, key=key), sorted(wanted, key=key), strict=True):
        assert one[:3] == other[:3]
        assert one[3:] == pytest.approx(other[3:], rel=1e-14)


def test_tradeoff() -> None:
    found = rows(tradeoff.tradeoff(MADE, "dates"))
    base = found.pop()
    assert (base["method"], base["step"]) == ("base", 0)
    assert base[METRIC] == MADE.base["dates"].scores[METRIC]
    domains = MADE.base["dates"].general.values()
    assert base["general_loss"] == pytest.approx(sum(domains) / len(domains), rel=1e-14)
    assert {row["task"] for row in found} == {"dates"}
    same(
        [
            (row["method"], row["seed"], row["step"], row[METRIC], row["general_loss"])
            for row in found
        ],
        by_step(
            "dates",
            lambda point: (point.scores[METRIC], statistics.fmean(point.general.values())),
        ),
    )


@pytest.mark.parametrize(
    ("draw", "column", "read"),
    [
        (progress.score_over_steps, METRIC, lambda point: (point.scores[METRIC],)),
        (progress.validation_loss, "validation_loss", lambda point: (point.loss,)),
        (
            progress.general_loss,
            "general_loss",
            lambda point: (statistics.fmean(point.general.values()),),
        ),
    ],
)
def test_progress(draw: Any, column: str, read: Any) -> None:
    found = rows(draw(MADE, "sums"))
    same(
        [(row["method"], row["seed"], row["step"], row[column]) for row in found],
        by_step("sums", read),
    )


def test_a_mean_is_of_steps_that_all_seeds_have() -> None:
    runs = counted(MADE, "dates", "esft-token")
    losses = {runs[0].folder: {10: 3.0, 20: 2.0, 30: 1.0}, runs[1].folder: {10: 4.0, 20: 2.5}}
    found = rows(progress.training_loss(MADE, "dates", losses))
    means = {row["step"]: row["training_loss"] for row in found if row["seed"] == "mean"}
    assert means == {10: 3.5, 20: 2.25}
    assert len(found) == 5 + 2


@pytest.mark.parametrize("task", ["dates", None])
def test_ends(task: str | None) -> None:
    for draw, across in (
        (ends.score_against_bytes, "bytes"),
        (ends.general_against_score, "general"),
    ):
        found = rows(draw(MADE, task))
        wanted: list[tuple[Any, ...]] = []
        for method in MADE.methods:
            seeds: dict[int, list[tuple[float, float]]] = {}
            for name in MADE.tasks if task is None else [task]:
                for run in counted(MADE, name, method):
                    out = run.outcome
                    assert out is not None
                    other = (
                        out.delta_bytes
                        if across == "bytes"
                        else statistics.fmean(out.general.values())
                    )
                    seeds.setdefault(run.seed, []).append((out.scores[METRIC].value, other))
            full = {
                seed: [statistics.fmean(pair[at] for pair in pairs) for at in (0, 1)]
                for seed, pairs in seeds.items()
                if len(pairs) == (2 if task is None else 1)
            }
            wanted += [(method, seed, *pair) for seed, pair in full.items()]
            columns = list(zip(*full.values(), strict=True))
            if columns:
                wanted.append((method, "mean", *map(statistics.fmean, columns)))
                wanted.append((method, "spread", *map(statistics.stdev, columns)))
        got = [(row["method"], row["seed"], row[METRIC], row[across]) for row in found]
        assert len(got) == len(wanted)
        for one, other in zip(sorted(got, key=repr), sorted(wanted, key=repr), strict=True):
            assert one[:2] == other[:2]
            assert one[2:] == pytest.approx(other[2:], rel=1e-9, abs=1e-12)


def test_sweep() -> None:
    found = rows(sweeps.sweep(MADE, "dates", "p"))
    assert {row["value"] for row in found} == {0.1, 0.4}
    for value in (0.1, 0.4):
        runs = [run for run in MADE.records if run.sweep == {"p": value}]
        assert len(runs) == 3
        for figure, read in (
            (METRIC, lambda out: out.scores[METRIC].value),
            ("general_loss", lambda out: statistics.fmean(out.general.values())),
            ("trained", lambda out: out.trained),
        ):
            own = {run.seed: read(run.outcome) for run in runs}
            wanted = {**own, "mean": statistics.fmean(own.values())}
            got = {
                row["seed"]: row["number"]
                for row in found
                if row["value"] == value and row["figure"] == figure
            }
            assert got == pytest.approx(wanted, rel=1e-14)
    assert sweeps.swept_keys(MADE) == ["p"]
    assert sweeps.sweep(MADE, "sums", "p") is None


def test_learning_rates() -> None:
    found = rows(sweeps.learning_rates(MADE, "dates"))
    assert len({row["value"] for row in found}) == 2
    for row in found:
        runs = [
            run
            for run in MADE.records
            if (run.task, run.method, run.learning_rate) == ("dates", row["method"], row["value"])
            and run.outcome is not None
            and not run.sweep
        ]
        scores = {run.seed: run.points[-1].scores[METRIC] for run in runs}
        if row["seed"] in ("mean", "chosen"):
            assert row["number"] == pytest.approx(statistics.fmean(scores.values()), rel=1e-14)
            assert row["seed"] == "mean" or all(run.chosen for run in runs)
        else:
            assert row["number"] == scores[row["seed"]]
    assert sum(row["seed"] == "chosen" for row in found) == len(MADE.methods)


def test_experts_per_layer() -> None:
    found = rows(experts.experts_per_layer(MADE, "dates"))
    selecting = [
        method
        for method in MADE.methods
        if any(run.outcome and run.outcome.selection for run in counted(MADE, "dates", method))
    ]
    assert list(dict.fromkeys(row["name"] for row in found)) == selecting
    assert len(selecting) == 4
    for row in found:
        sizes = []
        for run in counted(MADE, "dates", row["name"]):
            assert run.outcome is not None
            assert run.outcome.selection is not None
            sizes.append(len(run.outcome.selection.get(row["layer"], [])))
        assert row["experts"] == pytest.approx(statistics.fmean(sizes))


def test_routing_of_methods() -> None:
    found = rows(routing.routing_of_methods(MADE, "dates"))
    for row in found:
        drifts = {
            run.seed: (run.outcome.drift["before"], run.outcome.drift["after"])
            for run in counted(MADE, "dates", row["method"])
            if run.outcome and run.outcome.drift
        }
        wanted = drifts.get(row["seed"]) or [
            statistics.fmean(pair[at] for pair in drifts.values()) for at in (0, 1)
        ]
        shown = (row["percent_before"], row["percent_after"])
        assert shown == pytest.approx([100 * part for part in wanted])


def test_expert_map_and_change() -> None:
    before, after = made_scores(0), made_scores(1)
    chosen = select(before, p=0.4)
    drawn = experts.expert_map(before, name="a", title="a", selection=chosen, metric="gate")
    change = routing.routing_change(before, after, name="b", title="b", selection=chosen)
    share = routing.selected_share(before, after, chosen, name="c", title="c")
    wanted = []
    for layer, scores in before.layers.items():
        new = after.layers[layer].gate
        for expert in range(scores.experts):
            old = 100 * scores.gate[expert] / sum(scores.gate)
            wanted.append(
                (
                    layer,
                    expert,
                    old,
                    100 * new[expert] / sum(new),
                    int(expert in chosen.experts[layer]),
                )
            )
    assert len(wanted) == 3 * 8 + 6
    for one, two, (layer, expert, old, now, selected) in zip(
        rows(drawn), rows(change), wanted, strict=True
    ):
        for row in (one, two):
            assert (row["layer"], row["expert"], row["selected"]) == (layer, expert, selected)
        assert one["percent_of_layer"] == pytest.approx(old)
        assert two["percent_before"] == pytest.approx(old)
        assert two["percent_after"] == pytest.approx(now)
        assert two["change"] == pytest.approx(now - old)
    for row in rows(share):
        here = [line for line in wanted if line[0] == row["layer"] and line[-1]]
        assert row["percent_before"] == pytest.approx(sum(line[2] for line in here))
        assert row["percent_after"] == pytest.approx(sum(line[3] for line in here))
    assert [row["layer"] for row in rows(share)] == [1, 2, 3, 4]


def test_overlap_map() -> None:
    tasks = {"one": made_scores(0), "two": made_scores(1), "three": made_scores(2)}
    chosen = {name: select(scores, p=0.4).experts for name, scores in tasks.items()}
    found = rows(overlaps.overlap_map(overlap(tasks, p=0.4), name="a", title="a"))
    assert len(found) == 3 * (1 + 4)
    for row in found:
        layers = [1, 2, 3, 4] if row["layer"] == "all" else [row["layer"]]
        one, two = (
            {(layer, expert) for layer in layers for expert in chosen[row[name]][layer]}
            for name in ("first", "second")
        )
        assert row["overlap"] == len(one & two) / len(one | two)


def test_what_a_run_logged(tmp_path: Path) -> None:
    lines = [
        '{"step": 10, "loss": 2.5}',
        '{"step": 10, "eval_loss": 2.0}',
        '{"step": 20, "loss": 2.25}',
        '{"step": 30, "loss": NaN}',
        '{"step": 20, "loss": 2.125}',  # killed, and resumed from step 10
        '{"step": 40, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert logged(tmp_path, "loss") == {10: 2.5, 20: 2.125}
    assert logged(tmp_path / "nowhere", "loss") == {}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], "{", *lines[2:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: damaged"):
        logged(tmp_path, "loss")

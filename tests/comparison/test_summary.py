"""The tables of a comparison, cell by cell, against numbers worked out by hand."""

from __future__ import annotations

import json
import statistics

import pytest
from comparisons import comparison as made_up
from run_records import compared, run

from esft.comparison.records import Comparison
from esft.comparison.summary import paired_table, summary_table, tables, tradeoff_table
from esft.comparison.table import Cell, Table

# (dates, json) by seed.
SCORES = {
    "esft-token": [(0.80, 0.60), (0.82, 0.58), (0.81, 0.62)],
    "random": [(0.50, 0.30), (0.90, 0.32), (0.70, 0.34)],
    "full": [(0.84, 0.60), (0.86, 0.62), (0.85, 0.61)],
}


@pytest.fixture
def comparison() -> Comparison:
    lost = {"esft-token": 0.1, "random": 0.2, "full": 0.5}
    return compared(
        *(
            run(
                method,
                seed,
                score,
                lost[method] + 0.01 * seed,
                task=task,
                trained={"full": 1000}.get(method, 100),
                curve=[(0.0, 0.0), (score, lost[method])],
            )
            for method, seeds in SCORES.items()
            for seed, scores in enumerate(seeds)
            for task, score in zip(("dates", "json"), scores, strict=True)
        )
    )


def _cell(table: Table, row: str, column: str) -> Cell:
    keys = [column.key for column in table.columns]
    return next(found for found in table.rows if found.name == row).cells[keys.index(column)]


def test_the_summary_has_the_papers_layout(comparison: Comparison) -> None:
    table = summary_table(comparison)
    assert [row.name for row in table.rows] == ["base", "esft-token", "random", "full"]
    assert table.groups() == [("task score", 3), ("general loss", 3), ("cost", 8)]
    assert [column.title for column in table.columns[:6]] == (
        ["dates", "json", "average", "prose", "code", "average"]
    )


def test_a_cell_is_mean_and_spread_over_seeds(comparison: Comparison) -> None:
    table = summary_table(comparison)
    dates = [0.80, 0.82, 0.81]
    cell = _cell(table, "esft-token", "exact_match/dates")
    assert cell.value == pytest.approx(statistics.fmean(dates))
    assert cell.spread == pytest.approx(statistics.stdev(dates))
    assert cell.count == 3


def test_an_average_is_taken_within_seeds_first(comparison: Comparison) -> None:
    """Of 0.70, 0.70 and 0.715, not of the six scores, which differ by task."""
    cell = _cell(summary_table(comparison), "esft-token", "exact_match/average")
    by_seed = [(0.80 + 0.60) / 2, (0.82 + 0.58) / 2, (0.81 + 0.62) / 2]
    assert cell.value == pytest.approx(statistics.fmean(by_seed))
    assert cell.spread == pytest.approx(statistics.stdev(by_seed))


def test_the_best_and_what_differs_from_it_by_more_than_the_spread(comparison: Comparison) -> None:
    table = summary_table(comparison)
    # esft-token - full: -0.04 each time; random - full: -0.34, +0.04, -0.15, spread 0.19 and mean
    # -0.15, which is not further from 0.
    assert _cell(table, "full", "exact_match/dates").best
    assert _cell(table, "full", "exact_match/dates").differs is None
    assert not _cell(table, "esft-token", "exact_match/dates").best
    assert _cell(table, "esft-token", "exact_match/dates").differs is True
    assert _cell(table, "random", "exact_match/dates").differs is False
    # Less is better for losses and costs, and equal figures are equally good.
    assert _cell(table, "esft-token", "general").best
    assert [_cell(table, name, "trained").best for name in SCORES] == [True, True, False]
    # The untrained model takes no part.
    assert _cell(table, "base", "general") == Cell(1.0)
    assert _cell(table, "base", "trained") == Cell()


def test_general_losses_are_those_of_the_domains(comparison: Comparison) -> None:
    table = summary_table(comparison)
    assert _cell(table, "full", "general_prose").value == pytest.approx(1 + 0.51 - 0.25)
    assert _cell(table, "full", "general_code").value == pytest.approx(1 + 0.51 + 0.25)
    assert _cell(table, "full", "general").value == pytest.approx(1.51)


def test_costs_are_those_of_the_runs(comparison: Comparison) -> None:
    table = summary_table(comparison)
    costs = ("trained", "share", "bytes", "step_seconds", "seconds", "speed", "memory", "flops")
    assert [_cell(table, "esft-token", key).value for key in costs] == (
        pytest.approx([100, 0.1, 200, 0.4, 4.0, 1000.0, 5000, 6e9])
    )


def test_the_trade_off_is_at_the_scores_that_all_reach(comparison: Comparison) -> None:
    table = tradeoff_table(comparison)
    assert table.groups() == [("over the range of scores", 3), ("at a score", 3), ("at the end", 1)]
    # On dates all reach 0.5 (random, seed 0); straight lines, so the mean is that at 0.25.
    values = [0.25 / score * 0.1 for score in (0.80, 0.82, 0.81)]
    assert _cell(table, "esft-token", "forgotten/dates").value == pytest.approx(
        statistics.fmean(values)
    )
    assert _cell(table, "esft-token", "forgotten/dates").best
    assert _cell(table, "full", "forgotten_at_end").value == pytest.approx(0.51)
    assert "dates: scores from 0.0 to 50.0." in table.notes


def test_pairs_are_every_method_with_full_and_esft_with_chance(comparison: Comparison) -> None:
    table = paired_table(comparison)
    assert [row.name for row in table.rows] == (
        ["esft-token − full", "random − full", "esft-token − random"]
    )
    cell = _cell(table, "esft-token − full", "exact_match/dates")
    assert cell.value == pytest.approx(-0.04)
    assert cell.spread == pytest.approx(0.0, abs=1e-12)
    assert cell.low == pytest.approx(-0.04)
    assert cell.differs is True
    chance = _cell(table, "esft-token − random", "exact_match/dates")
    differences = [0.30, -0.08, 0.11]
    assert chance.value == pytest.approx(statistics.fmean(differences))
    assert chance.spread == pytest.approx(statistics.stdev(differences))
    assert chance.differs is False
    assert chance.low is not None
    assert chance.low < 0 < chance.value
    assert _cell(table, "esft-token − full", "gap").value < 0  # type: ignore[operator]


def test_what_lacks_runs_is_not_averaged_with_less_and_is_named() -> None:
    """A failed run, one outside of the choice, one of a sweep: none of them counts."""
    table = summary_table(
        compared(
            run("full", 0, 0.9),
            run("full", 0, 0.1, rate=1.0, chosen=False),
            run("full", 0, 0.1, sweep={"p": 0.1}),
            run("full", 1, 0.8, failed=True),
            run("lora", 0, 0.7),
            run("lora", 1, 0.7),
            run("full", 0, 0.9, task="json"),
            run("full", 1, 0.9, task="json"),
            run("random", 0, failed=True),
        )
    )
    assert _cell(table, "full", "exact_match/dates") == Cell(0.9, None, 1, best=True)
    assert _cell(table, "full", "exact_match/average").count == 1
    assert _cell(table, "lora", "exact_match/average") == Cell()
    assert table.notes[-1] == (
        "Runs that failed or have not ended are missing: full on dates (1 of 2); "
        "lora on json (0 of 2); random (all)."
    )


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("failures", [True, False])
@pytest.mark.parametrize("evaluations", [0, 5])
@pytest.mark.parametrize("domains", [[], ["prose"]])
@pytest.mark.parametrize("tasks", [["dates"], ["dates", "json"]])
def test_every_comparison_has_its_tables(
    tasks: list[str], domains: list[str], evaluations: int, failures: bool, seeds: list[int]
) -> None:
    comparison = made_up(
        tasks, seeds=seeds, domains=domains, evaluations=evaluations, failures=failures
    )
    for table in tables(comparison):
        assert all(len(row.cells) == len(table.columns) for row in table.rows)
        assert len({column.key for column in table.columns}) == len(table.columns)
        assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["title"] == table.title
        for row in table.rows:
            for column, cell in table.cells(row):
                assert (column.text(cell) == "–") == (cell.value is None)

"""The series of a sweep."""

from __future__ import annotations

import pytest
from run_records import compared, run

from esft.comparison.series import sweep_series, sweep_tables
from esft.comparison.statistics import Summary


def test_a_sweep_is_a_line_of_means_by_value() -> None:
    found = sweep_series(
        compared(
            run("full", 0, 0.99),  # outside of the sweep
            run("esft-token", 0, 0.6, 0.2, sweep={"p": 0.4}, trained=400),
            run("esft-token", 1, 0.8, 0.4, sweep={"p": 0.4}, trained=440),
            run("esft-token", 0, 0.5, 0.1, sweep={"p": 0.1}, trained=100),
            run("esft-token", 1, 0.5, failed=True, sweep={"p": 0.1}),
            run("esft-token", 0, 0.1, failed=True, sweep={"p": 0.2}),
            run("lora", 0, 0.3, sweep={"rank": 8}, task="json"),
            run("lora", 0, 0.2, sweep={"rank": 8}, task="json", rate=1.0, chosen=False),
        )
    )
    assert [(line.key, line.task, line.method) for line in found] == (
        [("p", "dates", "esft-token"), ("rank", "json", "lora")]
    )
    low, high = found[0].values
    assert (low.value, low.score, low.trained) == (
        0.1,
        Summary(0.5, None, 1),
        Summary(100, None, 1),
    )
    assert high.value == 0.4
    assert high.score.mean == pytest.approx(0.7)
    assert high.score.spread == pytest.approx(0.2 / 2**0.5)
    assert high.general is not None
    assert high.general.mean == pytest.approx(1.3)
    assert high.trained.mean == 420
    assert found[1].values[0].score == Summary(0.3, None, 1)


def test_without_a_chosen_rate_all_runs_count_and_without_a_sweep_there_is_no_series() -> None:
    swept = [run(seed=n, score=0.2 * n, chosen=False, sweep={"p": 1}) for n in range(3)]
    assert sweep_series(compared(*swept))[0].values[0].score.count == 3
    assert sweep_series(compared(run())) == []
    assert sweep_tables(compared(run())) == []


def test_a_sweeps_table_has_a_row_for_each_value() -> None:
    runs = [
        run(method, seed, score + 0.01 * seed, 0.5, sweep={"p": p}, trained=trained)
        for method, p, score, trained in (
            ("a", 0.4, 0.8, 40),
            ("a", 0.1, 0.6, 10),
            ("b", 0.1, 0.5, 9),
        )
        for seed in (0, 2)
    ]
    (table,) = sweep_tables(compared(*runs))
    assert table.title == "dates: what p does"
    assert [
        (row.name, *(column.text(cell) for column, cell in table.cells(row))) for row in table.rows
    ] == [
        ("a, p 0.1", "61.0 ± 1.4", "1.500 ± 0.000", "10"),
        ("a, p 0.4", "81.0 ± 1.4", "1.500 ± 0.000", "40"),
        ("b, p 0.1", "51.0 ± 1.4", "1.500 ± 0.000", "9"),
    ]

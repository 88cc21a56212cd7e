"""What cells say as text."""

from __future__ import annotations

import pytest

from esft.comparison.figures import Unit
from esft.comparison.table import Cell, Column, Row, Table


@pytest.mark.parametrize(
    ("unit", "value", "spread", "text"),
    [
        ("score", 0.9467, 0.0081, "94.7 ± 0.8"),
        ("score", 1.0, 0.0, "100.0 ± 0.0"),
        ("score", 0.5, None, "50.0"),
        ("percent", 0.039, 0.0, "3.9"),
        ("nats", 1.0634, 0.0021, "1.063 ± 0.002"),
        ("parameters", 199_680, 0.0, "199,680"),
        ("parameters", 199_680, 1234.4, "199,680 ± 1,234"),
        ("bytes", 999.6, None, "1 kB"),
        ("bytes", 999.4, None, "999 B"),
        ("bytes", 404_000, 12.0, "404 kB ± 12 B"),
        ("bytes", 0, None, "0 B"),
        ("bytes", 2.5e15, None, "2.5e+03 TB"),
        ("FLOPs", 2.034e12, None, "2.03 T"),
        ("seconds", 0.3846, None, "0.385 s"),
        ("seconds", 1234.5, None, "1,234 s"),
        ("tokens/s", 1234.5, 1.5, "1,234 ± 2"),
        ("score", None, None, "–"),
    ],
)
def test_a_cells_text(unit: Unit, value: float | None, spread: float | None, text: str) -> None:
    assert Column("key", "group", "title", unit).text(Cell(value, spread)) == text


def test_differences_have_a_sign_and_an_interval_their_spread_has_none() -> None:
    column = Column("key", "group", "title", "score", "higher", signed=True)
    cell = Cell(0.012, 0.005, 3, low=-0.0004, high=0.0244)
    assert column.text(cell) == "+1.2 ± 0.5"
    assert column.interval(cell) == "-0.0 to +2.4"
    assert column.interval(Cell(0.5)) == ""
    assert Column("key", "g", "t", "bytes", signed=True).text(Cell(-2048)) == "-2.05 kB"


@pytest.mark.parametrize(
    ("unit", "better", "heading"),
    [
        ("score", "higher", "dates ↑"),
        ("nats", "lower", "dates (nats) ↓"),
        ("percent", "lower", "dates (%) ↓"),
        ("steps", None, "dates"),
    ],
)
def test_a_heading_says_unit_and_direction(unit: Unit, better: object, heading: str) -> None:
    assert Column("key", "group", "dates", unit, better).heading == heading  # type: ignore[arg-type]


def test_a_table_groups_neighbours_and_is_json_ready() -> None:
    columns = tuple(Column(key, key[0], key, "score") for key in ("a1", "a2", "b1", "a3"))
    table = Table("key", "title", columns, (Row("full", tuple(map(Cell, (1, 2, 3, 4)))),), ("so",))
    assert table.groups() == [("a", 2), ("b", 1), ("a", 1)]
    found = table.to_dict()
    assert found["rows"]["full"]["b1"]["value"] == 3
    assert found["columns"]["a2"]["unit"] == "score"
    assert found["notes"] == ["so"]

"""The table of docs/scaling.md is what `esft plan` says."""

from __future__ import annotations

import pytest

from tools.scaling_table import MODELS, column, shown


def columns() -> dict[str, dict[str, str]]:
    """Return what the page says, by model."""
    head, _, *rows = (
        [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in shown().splitlines()
    )
    return {name: {row[0]: row[n] for row in rows} for n, name in enumerate(head[1:], start=1)}


def test_the_page_has_every_model() -> None:
    assert list(columns()) == list(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_page_has_the_figures_of_the_plan(name: str) -> None:
    assert columns()[name] == column(name), "python -m tools.scaling_table --write"

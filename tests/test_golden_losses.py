"""The first losses of each method on tiny-moe are those that were written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.golden_losses import COMMAND, RUNS, losses

GOLDEN = Path(__file__).parent / "golden" / "losses"


def test_every_run_has_its_file() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_written_down(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert golden["command"] == COMMAND
    # Another number of threads changes them by up to 1e-6 of their size; so may another machine.
    # Another expert, another seed or a learning rate 1 % higher changes them by more than 1e-4.
    assert losses(name, tmp_path / "run") == pytest.approx(golden["losses"], rel=5e-5)

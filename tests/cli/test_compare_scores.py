"""`esft scores diff` and `esft scores overlap`: what they print, draw and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import esft, esft_json, esft_process, refusal

ROWS = {"law": [0.4, 0.3, 0.2, 0.1], "code": [0.1, 0.2, 0.3, 0.4], "math": [0.4, 0.1, 0.1, 0.4]}


def write(path: Path, row: list[float]) -> Path:
    layer = {"experts": len(row), "token": row, "gate": row[::-1]}
    value = {"format": "esft-scores/1", "layers": {"1": layer, "2": layer}}
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write(tmp_path / f"{name}.json", row) for name, row in ROWS.items()}


def test_diff(files: dict[str, Path]) -> None:
    found = esft_json("scores", "diff", files["law"], files["math"], "--p", "0.5")
    assert found["distance"] == pytest.approx(0.3)
    assert found["layers"]["1"] | {"distance": 0, "rank_correlation": 0} == {
        "distance": 0,
        "rank_correlation": 0,
        "entered": [3],
        "left": [1],
        "overlap": 1 / 3,
    }
    # Reversed scores: the same distance, other experts.
    gate = esft_json(
        "scores", "diff", files["law"], files["math"], "--p", "0.5", "--metric", "gate"
    )
    assert (gate["layers"]["1"]["entered"], gate["layers"]["1"]["left"]) == ([0], [2])


def test_diff_prints_a_table(files: dict[str, Path]) -> None:
    result = esft_process("scores", "diff", files["law"], files["math"], "--p", "0.5")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[1:3] == [[layer, "0.300", "0.00", "0.33", "3", "1"] for layer in "12"]
    assert lines[3] == ["all", "0.300", "0.00", "0.33", "2", "2"]


def test_overlap(files: dict[str, Path], tmp_path: Path) -> None:
    plot = tmp_path / "overlap.png"
    found = esft_json("scores", "overlap", *files.values(), "--p", "0.5", "--plot", plot)
    assert found["names"] == ["law", "code", "math"]
    assert found["total"][0] == [1, 0, pytest.approx(1 / 3)]
    assert found["experts"] == [4, 4, 4]
    assert found["plot"] == str(plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = esft("scores", "overlap", *files.values(), "--p", "0.5")
    assert ["law", "4", "1.00", "0.00", "0.33"] in [x.split() for x in result.stdout.splitlines()]


def test_refusals(files: dict[str, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.json", [0.5, 0.5])
    assert "layer 1: law has 4 experts and other has 2" in refusal(
        "scores", "overlap", files["law"], other
    )
    assert "at least two tasks" in refusal("scores", "overlap", files["law"])
    assert "given twice" in refusal("scores", "overlap", files["law"], files["law"])
    assert "--p must be" in refusal("scores", "diff", files["law"], files["code"], "--p", "0")
    assert "no such scores file" in refusal("scores", "diff", files["law"], "none.json")
    plot = tmp_path / "law.json" / "x.png"
    assert "cannot write" in refusal("scores", "overlap", *files.values(), "--plot", plot)

"""`esft mask`: what it prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import esft as library
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, refusal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", "olmoe")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    rows = [{"prompt": f"{n} squared is ", "completion": str(n * n)} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    library.profile(checkpoint, data, tokens=100).write(scores)
    options = ["--scores", scores, "--metric", "gate", "--draws", "2", "--seed", "7"]
    printed = esft_json("mask", checkpoint, "--data", data, "--top", "3", *options)
    found = library.mask(
        checkpoint, data, top=3, scores=scores, metric="gate", draws=2, seed=7
    ).to_dict()
    assert printed == found
    assert (printed["top"], printed["metric"], len(printed["random"])) == (3, "gate", 2)
    evaluated = esft_json("eval", checkpoint, "--data", data)
    assert evaluated.pop("scores").keys() == {"exact_match"}
    assert printed["whole"] == evaluated


def test_table(checkpoint: Path, data: Path) -> None:
    result = esft("mask", checkpoint, "--data", data, "--top", "2", "--draws", "2")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    names = ["none", "the 2 best of each layer", "2 at random, seed 0", "2 at random, seed 1"]
    for line, name in zip(lines[1:], [*names, "2 at random, mean"], strict=True):
        assert line.startswith(name)
    assert " +- " in lines[-1]
    losses = [float(line[25:].split()[0]) for line in lines[1:]]
    assert losses[4] == pytest.approx((losses[2] + losses[3]) / 2, abs=1e-4)


def test_refusals(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    start = ["mask", checkpoint, "--data", data]
    assert "--top 7: layer 0 has 8 experts" in refusal(*start, "--top", "7")
    assert "--top 0: expected at least 1" in refusal(*start, "--top", "0")
    assert "--draws 0" in refusal(*start, "--top", "1", "--draws", "0")
    assert "--max-rows 0" in refusal(*start, "--top", "1", "--max-rows", "0")
    assert "no such scores file" in refusal(*start, "--top", "1", "--scores", "none.json")
    assert '--metric "tokens"' in refusal(*start, "--top", "1", "--metric", "tokens")
    data.write_text('{"prompt": "a"}\n')
    assert f"{data}:1: " in refusal(*start, "--top", "1")

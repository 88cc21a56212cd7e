"""Deterministic mode: equal bits of two processes, and a library that leaves torch as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from esft.errors import EsftError
from esft.run.determinism import deterministic
from tests.checkpoints import save_tiny
from tests.command import esft_json


def test_only_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_what_cannot_be_deterministic_is_named() -> None:
    message = "^deterministic: true cannot be kept: put_ does not have a deterministic implementat"
    with pytest.raises(EsftError, match=message), deterministic():
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), deterministic():
        raise RuntimeError("another")


@pytest.mark.slow
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n % 8]} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = []
    for name in ("one", "two"):
        options = ["--steps", "5", "--lr", "1e-2", "--deterministic", "--set", "data.max_length=32"]
        options += ["--set", "training.logging_steps=1", "--out", tmp_path / name]
        esft_json("train", base, "--data", data, *options)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curve = [(line.get("loss"), line.get("grad_norm")) for line in map(json.loads, lines)]
        assert len(curve) == 6
        files.append((curve, (tmp_path / name / "delta/esft_delta.safetensors").read_bytes()))
        assert "deterministic: true" in (tmp_path / name / "recipe.yaml").read_text()
    assert files[0] == files[1]

"""`esft generate` and `esft eval` with `--expert-memory`, and the functions behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import esft as library
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, refusal
from tests.offload.models import EXPERT, LEAST

ROOM = str(LEAST * 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [{"prompt": f"{n}+4=", "completion": f"{n + 4}"} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generate_answers_as_with_all_experts(checkpoint: Path) -> None:
    options = ("generate", checkpoint, "--prompt", "2+2=", "--max-new-tokens", "8")
    plain = esft(*options).stdout
    result = esft(*options, "--expert-memory", ROOM)
    assert result.stdout == plain
    where, figures = result.stderr.splitlines()
    assert where.startswith("24 experts of 3 layers: 221.2 kB in the checkpoint; 73.7 kB keep 5")
    assert figures.startswith("5 tokens read, ")
    assert "7 tokens written" in figures
    printed = esft_json(*options, "--expert-memory", ROOM, "--speculate", "2")
    assert printed["text"] + "\n" == plain
    offload = printed["offload"]
    assert offload["written"]["tokens"] == 7
    assert 0 < offload["written"]["recall"] <= 1
    assert 0 < offload["written"]["hit_rate"] < 1
    assert offload["bytes_moved"] == offload["fetched"] * EXPERT
    assert offload["expert_bytes"] <= LEAST * 4
    assert printed.keys() == {"prompt", "text", "offload"}


def test_eval_scores_as_with_all_experts(checkpoint: Path, data: Path) -> None:
    options = ("eval", checkpoint, "--data", data, "--metric", "chrf", "--max-new-tokens", "4")
    plain = esft_json(*options)
    assert "offload" not in plain
    printed = esft_json(*options, "--expert-memory", ROOM, "--speculate", "0")
    offload = printed.pop("offload")
    assert printed == plain
    assert offload["read"]["tokens"] > 6 * 4
    assert offload["written"]["tokens"] > 0
    assert offload["read"]["recall"] is None


def test_eval_in_few_bits_is_another_loss(checkpoint: Path, data: Path) -> None:
    plain = library.evaluate(checkpoint, data)
    memory = library.ExpertMemory("1MB", bits=2)
    found = library.evaluate(checkpoint, data, expert_memory=memory)
    assert found.loss != plain.loss
    assert found.offload == memory.figures.to_dict()
    result = esft("eval", checkpoint, "--data", data, "--expert-memory", "1MB", "--expert-bits", 2)
    assert f"{found.loss:.4f} nats a token" in result.stdout
    assert "in a temporary file" in result.stderr


def test_generate_in_python(checkpoint: Path) -> None:
    plain = library.generate(checkpoint, "2+2=", max_new_tokens=4)
    assert library.generate(checkpoint, "2+2=", max_new_tokens=4, expert_memory="1MB") == plain
    memory = library.ExpertMemory(LEAST * 2, ahead=0)
    assert library.generate(checkpoint, "2+2=", max_new_tokens=4, expert_memory=memory) == plain
    assert memory.figures.written.tokens == 3


def test_refusals(checkpoint: Path, data: Path) -> None:
    prompt = ("generate", checkpoint, "--prompt", "2+2=")
    assert f"at least {LEAST:,} " in refusal(*prompt, "--expert-memory", "1kB")
    assert "--expert-memory much: expected an amount" in refusal(*prompt, "--expert-memory", "much")
    few = refusal(*prompt, "--expert-memory", "1MB", "--expert-bits", "5")
    assert "--expert-bits 5: choose one of 16, 8, 4, 3, 2" in few
    scores = ("eval", checkpoint, "--data", data)
    for command, option in ((prompt, "--expert-bits"), (scores, "--speculate")):
        result = esft(*command, option, "4")
        assert result.returncode == 2
        assert "is for --expert-memory" in result.stderr
    result = esft("eval", checkpoint, "--harness", "arc", "--expert-memory", "1MB")
    assert result.returncode == 2
    assert "not with --harness" in result.stderr

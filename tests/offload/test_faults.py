"""Files that go while a model runs, budgets that are none, and what is left behind."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
import torch

from esft.errors import EsftError, ModelError
from esft.offload.expert_memory import ExpertMemory
from esft.weight_source import WeightSource
from tests.models import tiny
from tests.offload.models import EXPERT, IDS, LEAST, answers, logits, offloaded, resident


def shard_of(folder: Path, layer: int, expert: int) -> tuple[Path, int]:
    """Return the file that holds an expert, and a byte within it."""
    source = WeightSource.open(folder)
    key = source.places(source.layers[layer])["down_proj"][0].name(expert)
    entry = source.checkpoint.entries[key]
    return entry.file, entry.end - 1


@pytest.mark.parametrize("damage", ["truncated", "gone"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_shard_that_is_damaged_while_experts_are_fetched(
    tmp_path: Path, damage: str, ahead: int
) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    file, place = shard_of(tmp_path, 2, 5)
    with offloaded(tmp_path, ExpertMemory(LEAST * 3, ahead=ahead)) as model:
        whole = logits(model)
        content = file.read_bytes()
        if damage == "gone":
            file.unlink()
        else:
            os.truncate(file, place)
        with pytest.raises(ModelError, match=re.escape(str(file))):
            answers(model, tokens=30)
        file.write_bytes(content)
        assert torch.equal(logits(model), whole)  # and it goes on, once the file is back


def test_a_shard_that_is_damaged_before(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    file, place = shard_of(tmp_path, 0, 0)
    os.truncate(file, place)
    with (
        pytest.raises(ModelError, match=re.escape(str(file))),
        offloaded(tmp_path, "1GB"),
    ):
        pass


@pytest.mark.parametrize("budget", [1, EXPERT - 1, LEAST - 1])
def test_less_than_a_token_needs(tmp_path: Path, budget: int) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    with (
        pytest.raises(EsftError, match=rf"--expert-memory: {budget:,} bytes .* least {LEAST:,} "),
        offloaded(tmp_path, budget),
    ):
        pass


def test_the_least_is_enough(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    memory = ExpertMemory(LEAST)
    with offloaded(tmp_path, memory) as model:
        assert torch.equal(logits(model), logits(resident(tmp_path)))
    assert memory.figures.expert_bytes <= LEAST
    assert memory.figures.read.hits == 0


@pytest.mark.parametrize("text", ["0", "-1GB", "much", "2XB", ""])
def test_an_amount_that_is_none(text: str) -> None:
    with pytest.raises(EsftError, match="--expert-memory"):
        ExpertMemory(text)


def test_looking_back_is_refused() -> None:
    with pytest.raises(EsftError, match="--speculate -1: expected 0 or more"):
        ExpertMemory("2GB", ahead=-1)


def test_nothing_runs_on_when_the_model_is_closed(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    before = threading.active_count()
    with offloaded(tmp_path, LEAST * 3) as model:
        assert threading.active_count() == before + 1
        logits(model, IDS)
    assert threading.active_count() == before
    assert not hasattr(model, "esft_offload")

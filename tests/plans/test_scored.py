"""What a run scores at once, from its rows, and what that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import esft
from esft.plans.records import Plan
from esft.plans.scored import Scored
from tests.checkpoints import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("scored")
    save_tiny(made / "base")
    rows = [{"prompt": f"{n}:", "completion": "abcdef"[n % 6] * 9} for n in range(100)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def plan(folder: Path, data: dict[str, Any] | None = None, **keys: Any) -> Plan:
    files = {"train": str(folder / "rows.jsonl"), "max_length": 64}
    recipe = {"model": str(folder / "base"), "device": "cpu", "method": "lora"}
    training = {"per_device_train_batch_size": 1, "max_steps": 1, "gradient_checkpointing": True}
    return esft.plan(recipe | {"data": files | (data or {}), "training": training} | keys)


def test_nothing_is_scored_where_nothing_is_asked_for(folder: Path) -> None:
    found = plan(folder)
    assert found.batch.scored is None
    assert found.many.memory.evaluation == 0


def test_the_heaviest_batch_of_the_rows(folder: Path) -> None:
    found = plan(folder, {"test": str(folder / "rows.jsonl")})
    # The start, "99:", nine letters and the end; answers begin at the fourth token or the fifth.
    assert found.batch.scored == Scored(rows=100, length=14, kept=11, asked=None)
    memory = found.many.memory
    assert memory.evaluation is not None
    # Logits of 100 x 11 places, and of 1,024 of them twice more, in fp32; 300 tokens.
    assert memory.evaluation > memory.frozen + memory.trained + 4 * 300 * (1100 + 2 * 1024)
    assert memory.peak == max(memory.evaluation, memory.training or 0)
    assert memory.evaluation > (memory.training or 0)


def test_rows_that_are_not_here_are_taken_to_be_full(folder: Path) -> None:
    absent = {"test": "absent.jsonl"}
    found = plan(folder, absent, evaluation={"metrics": ["chrf"], "max_new_tokens": 36})
    assert found.batch.measured  # the rows that train are here
    assert found.batch.scored == Scored(rows=64, length=64, kept=64, asked=(40, 100))
    short = plan(folder, absent)
    assert short.many.memory.evaluation is not None
    assert found.many.memory.evaluation is not None
    assert found.many.memory.evaluation >= short.many.memory.evaluation

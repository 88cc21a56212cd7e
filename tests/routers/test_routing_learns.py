"""Whether losses of routers do what they are for: routing evens out while the task is learnt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import esft
from tests.checkpoints import save_tiny
from tests.test_gates import moderate

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    letters = random.Random(0)
    rows = [
        {"prompt": f"{n}:", "completion": "".join(letters.choices("abcdefgh", k=20))}
        for n in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose routers choose with a bias."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")
    moderate("deepseek_v3", vocab_size=300, n_group=1, topk_group=1).save_pretrained(folder)
    return folder


def imbalance(base: Path, data: Path, folder: Path, losses: dict[str, Any]) -> tuple[float, float]:
    """Train all with some losses; return the mean imbalance of the layers, and the task's loss."""
    recipe = {
        "model": base,
        "method": "full",
        "data": {"train": data, "max_length": 64},
        "losses": losses,
        "training": {
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 2,
            "logging_steps": STEPS,
            "seed": 0,
        },
    }
    run = esft.train(recipe, folder)
    esft.merge(base, run.delta, folder / "merged")
    scores = esft.profile(folder / "merged", data, tokens=400)
    found = [layer.routing.imbalance for layer in scores.layers.values() if layer.routing]
    assert run.train_loss is not None
    return sum(found) / len(found), run.train_loss


def test_routing_evens_out(base: Path, data: Path, tmp_path: Path) -> None:
    before = [
        layer.routing.imbalance
        for layer in esft.profile(base, data, tokens=400).layers.values()
        if layer.routing
    ]
    found = {
        name: imbalance(base, data, tmp_path / name, losses)
        for name, losses in {
            "without": {},
            "load_balance": {"load_balance": 0.5},
            "bias_update": {"bias_update": 0.02},
        }.items()
    }
    without, task = found["without"]
    print(f"\nmean imbalance before {sum(before) / len(before):.2f}, after {STEPS} steps:")
    for name, (even, loss) in found.items():
        print(f"{name}: {even:.2f}, task's loss {loss:.2f}")
    for name in ("load_balance", "bias_update"):
        even, loss = found[name]
        assert even - 1 < 0.6 * (without - 1), name
        assert loss < task + 0.3

"""Short runs of `esft.train` with losses of routers, and what is in each of their batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esft.data.encode import Example
from tests.test_training import metrics, recipe

ROWS, RATE, LENGTH = 8, 0.05, 24
CHOSEN = {0: [1, 6], 2: [4]}


def write_rows(path: Path) -> Path:
    """Write rows with 2 to 9 supervised tokens each."""
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def in_batches(examples: list[Example], packing: bool, size: int) -> list[list[Example]]:
    """What is in each batch: `size` rows, or `size` blocks of rows in order."""
    if packing:
        blocks: list[list[Example]] = [[]]
        for example in examples:
            if sum(len(e.input_ids) for e in [*blocks[-1], example]) > LENGTH:
                blocks.append([])
            blocks[-1].append(example)
    else:
        blocks = [[example] for example in examples]
    return [
        [example for block in blocks[i : i + size] for example in block]
        for i in range(0, len(blocks), size)
    ]


def wanted(base: Path, data: Path, losses: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    sections = {k: changes.pop(k) for k in ("train", "losses") if k in changes}
    made = recipe(
        base,
        data,
        data={"packing": changes.pop("packing", False), "max_length": LENGTH},
        **{
            "optim": "sgd",
            "max_grad_norm": 0,
            "learning_rate": RATE,
            "max_steps": 2,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "sequential",
        }
        | changes,
    )
    return made | sections | ({} if losses is None else {"losses": losses})


def first_loss(run: Path) -> float:
    return metrics(run)[0]["loss"]

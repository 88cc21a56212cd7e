"""A run that draws random numbers, and what is compared of two of its kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

STEPS, ROWS = 10, 14  # with batches of 2: 7 an epoch


def write_rows(path: Path, rows: int = ROWS) -> Path:
    """Write rows with 2 to 9 supervised tokens each."""
    made = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def recipe(base: Path, train: Path, **changes: Any) -> dict[str, Any]:
    """A run that draws random numbers while it trains, with a rate that depends on the step."""
    sections = {"method", "selection", "param_dtype", "model", "checkpoints"}
    return {
        "model": str(base),
        "data": {"train": str(train), "max_length": 16, "packing": False} | changes.pop("data", {}),
        **{key: changes.pop(key) for key in list(changes) if key in sections},
        "training": {
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "per_device_train_batch_size": 2,
            "neftune_noise_alpha": 1.0,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "seed": 0,
        }
        | changes,
    }


def delta_bytes(run: Path) -> bytes:
    return next((run / "delta").glob("*.safetensors")).read_bytes()


def logged(run: Path) -> list[Any]:
    """What was logged, less what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changing = {"seconds", "train_seconds", "peak_memory"}
    return [
        {key: value for key, value in line.items() if key not in changing}
        for line in lines
        if "train_runtime" not in line
    ]


def cut_back(run: Path, step: int) -> None:
    """Leave of a complete run what one killed after the checkpoint of `step` leaves."""
    shutil.rmtree(run / "delta")
    (run / "README.md").unlink()
    (run / "result.json").unlink()
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }

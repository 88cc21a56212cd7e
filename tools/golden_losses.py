"""Train tiny-moe for a few steps by each method and write down the losses.

Run it after a change that is meant to change them, from the repository's root:

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python tools/golden_losses.py tests/golden/losses
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import esft

STEPS = 6
COMMAND = "OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python tools/golden_losses.py tests/golden/losses"
# Small samples: the profile that selects experts takes most of the time otherwise.
_RULE = {"p": 0.2, "tokens": 2000, "seq_len": 256}
RUNS: dict[str, dict[str, Any]] = {
    "esft-token": {"method": "esft", "selection": _RULE | {"metric": "token"}},
    "esft-gate": {"method": "esft", "selection": _RULE | {"metric": "gate"}},
    "random": {"method": "random", "selection": _RULE | {"metric": "token"}},
    "lora": {"method": "lora"},
    "full": {"method": "full"},
}


def rows() -> list[dict[str, str]]:
    """Return rows that cannot change with the data that ships: months to numbers."""
    months = ["January", "February", "March", "April", "May", "June", "July", "August"]
    return [
        {"prompt": f"{day} {month} 19{day + 60} = ", "completion": f"19{day + 60}-0{n}-{day}"}
        for day in (11, 17, 23, 29)
        for n, month in enumerate(months, start=1)
    ]


def losses(name: str, folder: Path) -> list[float]:
    """Train one of `RUNS` in a new folder and return the loss of each step."""
    folder.mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    recipe = {
        "model": "tiny-moe",
        "device": "cpu",
        "dtype": "float32",
        "deterministic": True,
        "routing_drift": False,
        "data": {"train": data, "max_length": 64},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "seed": 0,
        },
        **RUNS[name],
    }
    run = esft.train(recipe, folder / "run")
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main(out: Path) -> None:
    """Write a file for each of `RUNS`."""
    out.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found = losses(name, Path(folder) / name)
        made = {
            "command": COMMAND,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "losses": found,
        }
        (out / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
        print(name, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

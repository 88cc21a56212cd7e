"""How a step's rows may be split among processes and batches, and the curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.resumed_runs import logged, recipe

ROWS, EPOCHS_END = 14, (4, 8)  # rows; steps of 4 that have the last 2 rows
# Of two processes by name, and of the one process that must have the same curve. Steps of 4 rows.
SPLITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"batch": 2}, {"batch": 4}),
    "accumulated": ({"batch": 1, "accumulated": 2}, {"batch": 4}),
    "packed": ({"batch": 2, "packing": True}, {"batch": 4, "packing": True}),
    "weighted": ({"batch": 2, "rows": "weighted"}, {"batch": 4, "rows": "weighted"}),
    "smoothed": (
        {"batch": 2, "label_smoothing_factor": 0.1},
        {"batch": 4, "label_smoothing_factor": 0.1},
    ),
    "recomputed": ({"batch": 2, "gradient_checkpointing": True}, {"batch": 4}),
    "dropped": (
        {"batch": 2, "dataloader_drop_last": True},
        {"batch": 4, "dataloader_drop_last": True},
    ),
    # Of a router's losses each batch has statistics of its own, in a process or accumulated.
    "balanced": (
        {"batch": 2, "losses": {"load_balance": 0.1, "router_z": 0.01}},
        {"batch": 2, "accumulated": 2, "losses": {"load_balance": 0.1, "router_z": 0.01}},
    ),
    "full": (
        {"batch": 2, "method": "full", "learning_rate": 1e-3},
        {"batch": 4, "method": "full", "learning_rate": 1e-3},
    ),
    "lora": ({"batch": 2, "method": "lora"}, {"batch": 4, "method": "lora"}),
    "rounded": ({"batch": 2, "frozen_dtype": "int8"}, {"batch": 4, "frozen_dtype": "int8"}),
    "hot-lora": ({"batch": 2, "method": "hot-lora"}, {"batch": 4, "method": "hot-lora"}),
}


def split(shared: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run whose steps are split in some way."""
    options = {"routing_drift": False} | options
    sections = {
        key: options.pop(key)
        for key in ("losses", "method", "evaluated", "routing_drift", "dtype", "frozen_dtype")
        if key in options
    }
    if sections.get("losses"):
        sections["train"] = {"router": True}
    data = {"packing": options.pop("packing", False)}
    if sections.pop("evaluated", False):
        data["eval"] = str(shared / "train.jsonl")
        sections["evaluation"] = {"metrics": ["chrf"], "max_new_tokens": 4}
        options |= {"eval_strategy": "steps", "eval_steps": 4}
    wanted = recipe(
        shared / "tiny",
        shared / f"{options.pop('rows', 'train')}.jsonl",
        data=data,
        per_device_train_batch_size=options.pop("batch"),
        gradient_accumulation_steps=options.pop("accumulated", 1),
        **{"neftune_noise_alpha": None, "save_strategy": "no"} | options,
    )
    return wanted | sections


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in logged(run) if "loss" in line]

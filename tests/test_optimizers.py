"""Every optimizer and schedule that a recipe may name: it learns, and resumes to the same bits."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import esft
from esft.errors import RecipeError
from esft.recipe import make_recipe
from esft.run.fields import BITSANDBYTES, OPTIMIZERS
from tests.checkpoints import save_tiny

STEPS, SAVED = 6, 4
RATES = {"sgd": 0.3, "adagrad": 3e-2, "rmsprop": 3e-3}
# The schedules have two steps of warm-up where they know one.
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"warmup_steps": 2},
    "cosine": {"warmup_steps": 2},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0}},
    "constant_with_warmup": {"warmup_steps": 2},
    "inverse_sqrt": {"warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "warmup_stable_decay": {
        "warmup_steps": 2,
        "lr_scheduler_kwargs": {"num_decay_steps": 2},
    },
    "reduce_lr_on_plateau": {
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0, "factor": 0.5},
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimizers")
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    selection = {"0": [1, 6], "2": [4, 0, 3, 7, 2, 5, 1, 6]}
    (folder / "selection.json").write_text(json.dumps({"experts": selection}))
    return {
        "model": save_tiny(folder / "base"),
        "selection": folder / "selection.json",
        "data": {"train": folder / "rows.jsonl", "max_length": 32},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVED,
        },
        "routing_drift": False,
    }


def learns_and_resumes(setting: dict[str, Any], folder: Path, **training: Any) -> list[float]:
    """Train, and go on from the middle in a copy without its end; return the learning rates."""
    wanted = setting | {"training": setting["training"] | training}
    if "eval_strategy" in training:
        wanted["data"] = setting["data"] | {"eval": setting["data"]["train"]}
    whole, resumed = folder / "whole", folder / "resumed"
    esft.train(wanted, whole)
    ends = shutil.ignore_patterns("delta", f"step-{STEPS:06d}")
    shutil.copytree(whole, resumed, ignore=ends)
    assert [item.name for item in (resumed / "checkpoints").iterdir()] == [f"step-{SAVED:06d}"]
    esft.train(wanted, resumed, resume=True)
    found = [load_file(run / "delta" / "esft_delta.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert logged[-1]["loss"] < logged[0]["loss"]
    return [line["learning_rate"] for line in logged]


@pytest.mark.parametrize(
    ("optim", "schedule"), list(zip(cycle(OPTIMIZERS), SCHEDULES, strict=False))
)
def test_learns_and_resumes(
    setting: dict[str, Any], tmp_path: Path, optim: str, schedule: str
) -> None:
    rate = RATES.get(optim, 1e-2)
    options = {"optim": optim, "learning_rate": rate, "lr_scheduler_type": schedule}
    options |= SCHEDULES[schedule]
    if optim == "sgd":
        options["optim_args"] = "momentum=0.9"
    rates = learns_and_resumes(setting, tmp_path, **options)
    if "warmup_steps" in options:
        assert rates[:3] == pytest.approx([0, rate / 2, rate])
    if schedule != "constant_with_warmup":
        assert rates[-1] < 0.9 * max(rates)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "ademamix_8bit"])
def test_optimizers_of_bitsandbytes(setting: dict[str, Any], tmp_path: Path, optim: str) -> None:
    # The parameters of layer 2 have more than 4,096 elements: fewer are kept in 32 bits.
    learns_and_resumes(setting, tmp_path, optim=optim, learning_rate=3e-3)


def test_bitsandbytes_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for optim in BITSANDBYTES:
        with pytest.raises(RecipeError, match=f"{optim} needs bitsandbytes: pip install bitsan"):
            make_recipe({"model": "m", "data": {"train": "t"}, "training": {"optim": optim}})


def test_clipping_bounds_the_step(setting: dict[str, Any], tmp_path: Path) -> None:
    # Plain gradient descent: the first step is as long as the clipped gradient is.
    before = None
    for limit in (0.0, 1e-3):
        options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": limit}
        result = esft.train(
            setting | {"training": setting["training"] | options}, tmp_path / str(limit)
        )
        base = load_file(Path(setting["model"]) / "model.safetensors")
        delta = load_file(result.delta / "esft_delta.safetensors")
        length = sum(float((t - base[name]).square().sum()) for name, t in delta.items()) ** 0.5
        logged = json.loads((result.out / "metrics.jsonl").read_text().splitlines()[0])
        assert logged["grad_norm"] > 0.01
        assert length == pytest.approx(limit or logged["grad_norm"], rel=1e-2)
        assert before is None or logged["grad_norm"] == pytest.approx(before)
        before = logged["grad_norm"]

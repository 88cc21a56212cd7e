"""Runs of `esft.train` in several processes; tests/distributed/test_train.py says what is expected.

The folder above a scenario's has the base, `tiny`, and the rows, `train.jsonl`.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

import esft
from esft import processes
from esft.errors import EsftError
from esft.progress import Task
from esft.run.checkpoint import complete
from tests.distributed import apart
from tests.distributed.splits import SPLITS, split
from tests.resumed_runs import cut_back, delta_bytes, logged


def the_same_curves(folder: Path) -> dict[str, Any]:
    found = {}
    for name, (options, _) in SPLITS.items():
        run = folder / name
        result = esft.train(split(folder.parent, options), run)
        found[name] = {"steps": result.steps, "loss": result.train_loss}
    return found


def experts_that_only_one_sees(folder: Path) -> None:
    for family in apart.FAMILIES:
        for kind in apart.KINDS:
            wanted = apart.recipe(folder.parent / family, kind, batch=1)
            esft.train(wanted, folder / f"{family}-{kind}")


def resumes_to_the_same_bits(folder: Path) -> dict[str, Any]:
    """With random draws, which are each process's own."""
    wanted = split(
        folder.parent,
        {"batch": 2, "neftune_noise_alpha": 1.0, "save_strategy": "steps", "logging_steps": 3},
    )
    wanted["checkpoints"] = {"keep_last": 9}
    esft.train(wanted, folder / "whole")
    if processes.is_main():
        shutil.copytree(folder / "whole", folder / "cut")
        cut_back(folder / "cut", 6)
    dist.barrier()
    esft.train(wanted, folder / "cut", resume=True)
    return {
        "same": delta_bytes(folder / "cut") == delta_bytes(folder / "whole"),
        "logged": logged(folder / "cut") == logged(folder / "whole"),
    }


def goes_on_with_what_one_process_saved(folder: Path) -> dict[str, Any]:
    """`one` was copied here, cut back to step 6."""
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"batch": 2, "save_strategy": "steps"}
    for name, change in (("other rows", {"batch": 4}), ("resumed", {})):
        try:
            esft.train(split(folder.parent, options | change), folder.parent / "one", resume=True)
        except EsftError as error:
            found[name] = [type(error).__name__, str(error)]
        dist.barrier()
    return found


def saves_for_one_process(folder: Path) -> list[int]:
    wanted = split(folder.parent, {"batch": 1, "accumulated": 2, "save_strategy": "steps"})
    wanted["checkpoints"] = {"keep_last": 9}
    esft.train(wanted, folder / "two")
    return [saved.step for saved in complete(folder / "two" / "checkpoints")]


class _Signals(Task):
    """Sends a signal to another process after some steps."""

    def __init__(self, process: int, steps: int) -> None:
        self._process, self._left = process, steps

    def advance(self, units: int = 1, tokens: int = 0, **figures: float) -> None:
        self._left -= units
        if not self._left:
            os.kill(self._process, signal.SIGTERM)


class _Signalling:
    """A reporter of the first process through which the other one gets a signal in step 4."""

    def __init__(self, process: int) -> None:
        self._process = process

    def note(self, text: str) -> None:
        """Nobody listens."""

    def task(self, title: str, total: int, unit: str) -> Task:
        return _Signals(self._process, 3) if title == "training" else Task()


def a_signal_to_one_stops_both(folder: Path) -> list[Any]:
    other = processes.gathered(os.getpid(), "test")[1]
    wanted = split(folder.parent, {"batch": 2})
    try:
        esft.train(wanted, folder / "run", reporter=_Signalling(other))
    except esft.Interrupted as interrupted:
        dist.barrier()
        steps = [saved.step for saved in complete(folder / "run" / "checkpoints")]
        return [interrupted.code, steps]
    return []


def errors_of_one_end_both(folder: Path) -> dict[str, Any]:
    """In turn: before anything is read, when the run's folder is locked, while rows are read."""
    shared, found = folder.parent, {}
    good = split(shared, {"batch": 2})
    first, last = processes.is_main(), not processes.is_main()
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").write_text("")
    missing = good | {"data": {"train": str(folder / "missing.jsonl")}}
    for name, wanted, out in (
        ("the last one's recipe", {"model": "x"} if last else good, folder / "a"),
        ("the last one's rows", missing if last else good, folder / "b"),
        ("the first one's rows", missing if first else good, folder / "c"),
        ("the folder", good, folder / "taken"),
        ("the order of rows", _with(good, train_sampling_strategy="group_by_length"), folder / "d"),
        ("a diverging run", _with(good, learning_rate=1e30, warmup_steps=0), folder / "e"),
    ):
        try:
            esft.train(wanted, out)
        except EsftError as error:
            found[name] = [type(error).__name__, str(error)]
        dist.barrier()
        found[f"{name}: written"] = sorted(p.name for p in out.glob("*")) if out.exists() else []
    return found


def _with(wanted: dict[str, Any], **training: Any) -> dict[str, Any]:
    return wanted | {"training": wanted["training"] | training}

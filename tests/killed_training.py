"""Train, kill the process with SIGKILL at a given moment, resume in another; see what comes out.

Run as a script: `killed_training.py RECIPE FOLDER` prints, as JSON, by moment what was left and
what the resumed run made of it. Every run is a process of its own, forked after the imports.
"""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esft import checkpoint, delta, files, manifest, trainer, training
from esft.recipe import read_recipe

# Where the process dies: a function it is about to call, and at which of the calls.
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "before the first step": (trainer.EsftTrainer, "training_step", 0),
    "before the first checkpoint": (trainer.EsftTrainer, "training_step", 1),
    "in the middle of a step": (trainer.EsftTrainer, "training_step", 5),
    "in the first epoch": (trainer.EsftTrainer, "training_step", 6),
    "in the second epoch": (trainer.EsftTrainer, "training_step", 12),
    "while a checkpoint's tensors are written": (checkpoint, "save_file", 1),
    "before a checkpoint's last file": (checkpoint, "write_text", 1),
    "before a checkpoint is renamed": (files, "_swap", 2),
    "before an old checkpoint is deleted": (files.shutil, "rmtree", 0),
    "before the delta is written": (delta, "write_shards", 0),
    "before the manifest": (manifest, "write_json", 1),
}


def in_a_process(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def dying(owner: Any, name: str, at_call: int) -> None:
    """Make this process kill itself when a function is called once more than `at_call` times."""
    original, calls = getattr(owner, name), 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if calls == at_call:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += 1
        return original(*arguments, **options)

    setattr(owner, name, wrapper)


def found(run: Path) -> dict[str, Any]:
    checkpoints = run / "checkpoints"
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    weights = run / "delta" / "esft_delta.safetensors"
    return {
        "checkpoints": sorted(p.name for p in checkpoints.iterdir())
        if checkpoints.is_dir()
        else [],
        "logged": [line["step"] for line in map(json.loads, lines) if "loss" in line],
        "delta": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
    }


def main(recipe: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    settings = read_recipe(recipe)
    whole = folder / "whole"
    in_a_process(lambda: training.train(settings, whole))
    results = {"never": found(whole)}
    for number, (moment, where) in enumerate(MOMENTS.items()):
        run = folder / str(number)

        def killed(run: Path = run, where: tuple[Any, str, int] = where) -> None:
            dying(*where)
            training.train(settings, run)

        ended = in_a_process(killed)
        left = found(run)
        if any(name.startswith("step-") for name in left["checkpoints"]):
            in_a_process(lambda run=run: training.train(settings, run, resume=True))
        results[moment] = {"signal": ended, "left": left, **found(run)}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Resumable training state: what a killed run needs to go on as if it had not been killed.

A folder `step-000100` with `state.safetensors` (trained parameters, optimizer, torch's random
state), `trainer_state.json` (data position, log history) and `state.json` (scheduler, other random
states, what the run was made of, the hashes of all this), no pickle. It is written under a
temporary name and renamed, so a folder of that name is complete. The stock resume of transformers
is not used: it silently restores the initial weights of fused experts.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from esft.errors import CheckError, EsftError
from esft.files import (
    explain_write_errors,
    new_folder,
    read_json,
    sha256_file,
    write_json,
    write_text,
)
from esft.moe import trainable_parameters

FORMAT = "esft-checkpoint/1"
STATE = "state.json"
TENSORS = "state.safetensors"
TRAINER = "trainer_state.json"  # the name under which transformers' Trainer looks for its own
_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint on disk, a folder `step-<optimizer steps done>`."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.name.removeprefix("step-"))


def save(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    trainer: Mapping[str, Any],
    guard: Mapping[str, Any],
) -> SavedState:
    """Write a checkpoint `folder/step-<step>`.

    Args:
        folder: holds a run's checkpoints.
        step: optimizer steps done.
        model: its trainable parameters are saved, nothing else.
        optimizer: a torch optimizer over these parameters.
        scheduler: a torch learning-rate scheduler.
        trainer: the loop's own state, JSON-ready (data position, log history).
        guard: what must be the same when the run is resumed, see `check`.

    Raises:
        OutputError: the disk is full or read-only; earlier checkpoints are as they were.
    """
    tensors = {f"parameter/{name}": p.detach() for name, p in trainable_parameters(model).items()}
    packed = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, state in packed["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    tensors["random/torch"] = torch.random.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.random.get_rng_state()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path = folder / f"step-{step:06d}"
    with new_folder(path, replace=True) as temporary:
        with explain_write_errors(path, needed=sum(t.nbytes for t in tensors.values())):
            save_file(tensors, temporary / TENSORS)
        write_json(temporary / TRAINER, dict(trainer))
        state = {
            "format": FORMAT,
            "step": step,
            "guard": dict(guard),
            "scheduler": scheduler.state_dict(),
            "optimizer": {"groups": packed["param_groups"], "scalars": scalars},
            "random": {"python": _python_random(), "numpy": _numpy_random()},
        }
        hashes = {name: sha256_file(temporary / name) for name in (TENSORS, TRAINER)}
        hashes[STATE] = _hash(state)
        write_text(temporary / STATE, _json(state | {"sha256": hashes}))
    return SavedState(path)


def check(saved: SavedState, guard: Mapping[str, Any]) -> None:
    """Check a checkpoint before it is restored: it is whole, and the run has not changed.

    Raises:
        CheckError: it is damaged; names the file.
        EsftError: the recipe, the data, the selection or the base is another one than then; names
            each difference.
    """
    state = _state(saved)
    hashes = state.pop("sha256")
    for name in (TENSORS, TRAINER, STATE):
        path = saved.folder / name
        found = _hash(state) if name == STATE else sha256_file(path) if path.is_file() else None
        if found != hashes.get(name):
            raise CheckError(f"{path}: damaged: not the sha256 in {STATE}; delete this checkpoint")
    then, now = _flat(state["guard"]), _flat(dict(guard))
    lines = [
        f"  {key}: {then.get(key, 'unset')} then, {now.get(key, 'unset')} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if lines:
        raise EsftError(f"{saved.folder}: cannot resume, the run has changed:\n" + "\n".join(lines))


def restore_parameters(saved: SavedState, model: nn.Module) -> None:
    """Load the trained parameters into a model that was prepared in the same way, in place."""
    tensors = _tensors(saved, "parameter")
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            parameter.copy_(tensors[name])


def restore_optimizer(saved: SavedState, optimizer: Any, scheduler: Any) -> None:
    """Load the optimizer's and the scheduler's state, in place."""
    state = _state(saved)
    packed: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in state["optimizer"]["scalars"].items()
    }
    for name, tensor in _tensors(saved, "optimizer").items():
        index, _, key = name.partition("/")
        packed.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": packed, "param_groups": state["optimizer"]["groups"]})
    scheduler.load_state_dict(state["scheduler"])


def restore_random(saved: SavedState) -> None:
    """Put the random states of Python, NumPy and torch back to where they were."""
    state, tensors = _state(saved), _tensors(saved, "random")
    version, numbers, gauss = state["random"]["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["random"]["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.random.set_rng_state(tensors["cuda"])


def last(folder: Path) -> SavedState | None:
    """Return the checkpoint with the most steps, or None."""
    return max(_all(folder), key=lambda saved: saved.step, default=None)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` last checkpoints, and what a kill left unfinished."""
    for saved in sorted(_all(folder), key=lambda saved: saved.step)[:-keep]:
        shutil.rmtree(saved.folder, ignore_errors=True)
    for unfinished in folder.glob(".step-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def _all(folder: Path) -> list[SavedState]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return [SavedState(path) for path in found]


def _state(saved: SavedState) -> dict[str, Any]:
    try:
        state = read_json(saved.folder / STATE, "checkpoint")
    except EsftError as error:
        raise CheckError(str(error)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckError(f"{saved.folder / STATE}: not of format {FORMAT}")
    if not isinstance(state.get("sha256"), dict):
        raise CheckError(f"{saved.folder / STATE}: damaged: it has no hashes")
    return state


def _tensors(saved: SavedState, kind: str) -> dict[str, Tensor]:
    """Read the tensors `kind/NAME`, by NAME, into memory of their own."""
    with safe_open(saved.folder / TENSORS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{kind}/")]  # noqa: SIM118
        # Else they are views of the file, which the optimizer would keep for the whole run.
        return {name.removeprefix(f"{kind}/"): file.get_tensor(name).clone() for name in names}


def _json(state: Mapping[str, Any]) -> str:
    # Unlike other files of esft's, this one may hold infinities: some schedulers start from one.
    return json.dumps(state, indent=1) + "\n"


def _hash(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(state).encode()).hexdigest()


def _python_random() -> list[Any]:
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _numpy_random() -> list[Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat

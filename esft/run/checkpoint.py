"""Resumable training state: what a killed run needs to go on as if it had not been killed.

A folder `step-000100` whose files docs/checkpoint-format.md describes, no pickle among them. It is
written under a temporary name, synced and renamed, its manifest with every hash last, so a folder
of that name is complete. The stock resume of transformers is not used: it silently restores the
initial weights of fused experts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from esft.errors import CheckError
from esft.files import (
    explain_write_errors,
    new_folder,
    read_json,
    remove_folder,
    remove_unfinished,
    sha256_file,
    write_json,
    write_text,
)
from esft.run.state_tree import digest, pack, unpack

FORMAT = "esft-checkpoint/2"
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "state.safetensors"
TRAINER = "trainer_state.json"  # the name under which transformers' Trainer looks for its own
_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class SavedState:
    """A checkpoint on disk, a folder `step-<optimizer steps done>`."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.name.removeprefix("step-"))

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Its manifest.

        Raises:
            CheckError: there is none, it is damaged, or of another format.
        """
        path = self.folder / MANIFEST
        old = self.folder / STATE
        if not path.exists() and old.is_file():
            read = read_json(old, "checkpoint", CheckError)
            if isinstance(read, dict) and read.get("format") == "esft-checkpoint/1":
                raise CheckError(
                    f"{self.folder}: of format esft-checkpoint/1, which cannot be resumed to the "
                    f"same bits; finish the run with the esft that began it, or start it again"
                )
        manifest = read_json(path, "checkpoint", CheckError)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise CheckError(f"{path}: of format {found}; this esft reads {FORMAT}")
        own = manifest.pop("sha256", None)
        if own != _hash(manifest):
            raise CheckError(f"{path}: damaged: not the sha256 in it")
        return manifest

    @property
    def metrics(self) -> dict[str, float]:
        """What was evaluated at this step: `eval_loss`, ...; empty if nothing was."""
        return self.manifest["metrics"]

    @property
    def looks_complete(self) -> bool:
        """Whether there is a sound manifest and every file has its length; reads no hashes."""
        try:
            return all(
                (self.folder / name).stat().st_size == entry["bytes"]
                for name, entry in self.manifest["files"].items()
            )
        except (CheckError, OSError):
            return False

    def check(self) -> None:
        """Read every file and compare its hash.

        Raises:
            CheckError: a file is missing or damaged; names it.
        """
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise CheckError(f"{path}: missing; this checkpoint is damaged")
            if sha256_file(path) != entry["sha256"]:
                raise CheckError(f"{path}: damaged: not the sha256 in {MANIFEST}")

    def read(self, part: str) -> Any:
        """Return a part of the state as it was given to `save`, its tensors on the CPU."""
        with safe_open(self.folder / TENSORS, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{part}/")]  # noqa: SIM118
            # Else they are views of the file, which an optimizer would keep for the whole run.
            tensors = {name: file.get_tensor(name).clone() for name in names}
        return unpack(read_json(self.folder / STATE, "checkpoint", CheckError)[part], tensors)

    def verify(self, part: str, restored: Any) -> None:
        """Check that what was restored is what was saved, to the bit.

        Args:
            part: of the state.
            restored: what the run has in its place now.

        Raises:
            CheckError: it is something else; names the first difference. Some library changed
                the state when it was loaded.
        """
        packed, tensors = pack(restored, part)
        hashes = {k: v for k, v in self.manifest["tensors"].items() if k.startswith(f"{part}/")}
        saved = read_json(self.folder / STATE, "checkpoint", CheckError)[part]
        changed = [
            name
            for name in sorted(hashes.keys() | tensors.keys())
            if name not in tensors or hashes.get(name) != digest(tensors[name])
        ]
        if json.loads(json.dumps(packed)) != saved:
            changed.append(part)
        if changed:
            raise CheckError(
                f"{self.folder}: cannot be restored: {changed[0]} is not what it was when saved, "
                f"after loading; is a library another version than then?"
            )


def save(
    folder: Path,
    *,
    step: int,
    state: Mapping[str, Any],
    trainer: Mapping[str, Any],
    guard: Mapping[str, Any],
    environment: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> SavedState:
    """Write a checkpoint `folder/step-<step>`.

    Args:
        folder: holds a run's checkpoints.
        step: optimizer steps done.
        state: by part (parameter, optimizer, random, ...), what `SavedState.read` returns; see
            `esft.run.state_tree.pack` for what it may hold.
        trainer: the loop's own state, JSON-ready (data position, log history).
        guard: what must be the same when the run is resumed, see `esft.run.guard`.
        environment: where the run was, see `esft.run.guard.environment`.
        metrics: what was evaluated at this step.

    Raises:
        OutputError: the disk is full or read-only; earlier checkpoints are as they were.
    """
    tree: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part, value in state.items():
        tree[part], found = pack(value, part)
        tensors |= found
    path = folder / f"step-{step:06d}"
    with new_folder(path, replace=True) as temporary:
        with explain_write_errors(path, needed=sum(t.nbytes for t in tensors.values())):
            save_file(tensors, temporary / TENSORS)
        # Unlike other files of esft's these may hold infinities: some schedulers begin with one,
        # and under a gradient scaler a norm may be one.
        write_text(temporary / STATE, json.dumps(tree, indent=1) + "\n")
        write_text(temporary / TRAINER, json.dumps(dict(trainer), indent=1) + "\n")
        files = {
            name: {
                "bytes": (temporary / name).stat().st_size,
                "sha256": sha256_file(temporary / name),
            }
            for name in (TENSORS, STATE, TRAINER)
        }
        manifest = {
            "format": FORMAT,
            "step": step,
            "metrics": dict(metrics or {}),
            "environment": dict(environment),
            "guard": dict(guard),
            "files": files,
            "tensors": {name: digest(tensor) for name, tensor in sorted(tensors.items())},
        }
        write_json(temporary / MANIFEST, manifest | {"sha256": _hash(manifest)})
    return SavedState(path)


def complete(folder: Path) -> list[SavedState]:
    """Return the checkpoints that look complete, fewest steps first."""
    return [saved for saved in _all(folder) if saved.looks_complete]


def last(folder: Path) -> SavedState | None:
    """Return the checkpoint with the most steps that looks complete, or None."""
    return next(reversed(complete(folder)), None)


def best(folder: Path, metric: str = "eval_loss", *, greater: bool = False) -> SavedState | None:
    """Return the complete checkpoint with the best score, the earliest of equals, or None.

    Args:
        folder: holds a run's checkpoints.
        metric: a key of what is evaluated; `eval_` may be left out. Checkpoints of steps that
            were not evaluated have none and are not looked at.
        greater: whether more is better.
    """
    return next(iter(_ranked(complete(folder), metric, greater)), None)


def whole(folder: Path) -> tuple[SavedState, list[str]]:
    """Return the last checkpoint whose every hash is right, and what is wrong with later ones.

    Raises:
        CheckError: there are checkpoints, but all are damaged; says how.
        LookupError: there is none.
    """
    wrong: list[str] = []
    for saved in reversed(_all(folder)):
        try:
            saved.check()
        except CheckError as error:
            wrong.append(str(error))
        else:
            return saved, wrong
    if wrong:
        raise CheckError("\n".join(wrong))
    raise LookupError(folder)


def prune(
    folder: Path,
    newest: SavedState,
    *,
    keep_last: int,
    keep_best: int = 0,
    metric: str = "eval_loss",
    greater: bool = False,
) -> None:
    """Delete the checkpoints that need not be kept, and what a kill left unfinished.

    Args:
        folder: holds a run's checkpoints.
        newest: the one just written. Those with more steps are what a resumed run has left
            behind: damaged ones.
        keep_last: how many of the last to keep, 1 or more, `newest` among them.
        keep_best: how many of the best to keep beside them.
        metric: see `best`.
        greater: see `best`.
    """
    done = [saved for saved in complete(folder) if saved.step <= newest.step]
    kept = {saved.step for saved in done[-keep_last:]} | {newest.step}
    kept |= {saved.step for saved in _ranked(done, metric, greater)[:keep_best]}
    for saved in _all(folder):
        if saved.step not in kept:
            remove_folder(saved.folder)
    remove_unfinished(folder)


def _ranked(found: list[SavedState], metric: str, greater: bool) -> list[SavedState]:
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    scored = [saved for saved in found if key in saved.metrics]
    sign = -1 if greater else 1
    return sorted(scored, key=lambda saved: (sign * saved.metrics[key], saved.step))


def _all(folder: Path) -> list[SavedState]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(map(SavedState, found), key=lambda saved: saved.step)


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

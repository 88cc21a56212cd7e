"""X1: pickles, which run what their author wants when they are read; none is.

A canary is a pickle that makes a folder when it is read. Each case shows at its end that its
canary would have sung.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_tiny
from tests.command import Argument, esft
from tests.deltas import CONFIG, WEIGHTS

ROWS = "".join(json.dumps({"prompt": f"{n}:", "completion": "ab"}) + "\n" for n in range(8))


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.folder),)


class Trap:
    """A folder to work in, and pickles in it that must not be read.

    Attributes:
        base: a checkpoint that a test may spoil.
        data: rows.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self._folder, self._set = folder, {}
        self.base = Path(shutil.copytree(base, folder / "base"))
        self.data = folder / "rows.jsonl"
        self.data.write_text(ROWS)

    def set(self, file: Path) -> None:
        """Put a pickle with a canary of its own where a file was or was not."""
        canary = self._folder / f"canary {len(self._set)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps({"weight": Canary(canary)}))
        self._set[file] = canary

    def check(self) -> None:
        """Nothing was read; all of it sings when it is."""
        assert self._set
        for file, canary in self._set.items():
            assert not canary.exists(), f"{file} was read"
            pickle.loads(file.read_bytes())
            assert canary.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved") / "base")


@pytest.fixture
def trap(saved: Path, tmp_path: Path) -> Iterator[Trap]:
    trap = Trap(tmp_path, saved)
    yield trap
    trap.check()


def refused(*arguments: Argument) -> str:
    """Run a command, which must end with an error; return it."""
    result = esft(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def train(trap: Trap, run: Path, *more: Argument) -> list[Argument]:
    options: list[Argument] = ["--data", trap.data, "--steps", 2, "--set", "data.max_length=16"]
    return ["train", trap.base, *options, "--out", run, *more]


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model.bin",),
        ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
        ("consolidated.00.pth", "model.pt", "model.ckpt", "adapter_model.bin"),
    ],
    ids=["pytorch_model.bin", "indexed", "other names"],
)
def test_x1_a_base_of_pickles_only(names: tuple[str, ...], trap: Trap, tmp_path: Path) -> None:
    (trap.base / "model.safetensors").unlink()
    for name in names:
        if name.endswith(".json"):
            weight_map = {"model.norm.weight": names[0]}
            (trap.base / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        else:
            trap.set(trap.base / name)
    for command in (
        ["profile", trap.base, "--data", trap.data, "--out", tmp_path / "scores.json"],
        train(trap, tmp_path / "run"),
        ["eval", trap.base, "--data", trap.data],
    ):
        assert "safetensors" in refused(*command)
    assert not (tmp_path / "run").exists()


def test_x1_weights_of_other_kinds_named_safetensors(trap: Trap) -> None:
    trap.set(trap.base / "model.safetensors")
    assert "model.safetensors: " in refused("eval", trap.base, "--data", trap.data)


def test_x1_pickles_in_a_runs_checkpoint(trap: Trap, tmp_path: Path) -> None:
    """The names under which transformers keeps its state, in a checkpoint that is resumed."""
    saving = ["--set", "training.save_strategy=steps", "--set", "training.save_steps=1"]
    command = train(trap, tmp_path / "run", *saving)
    assert esft(*command).returncode == 0
    expected = (tmp_path / "run" / "delta" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "run" / "delta")
    checkpoints = tmp_path / "run" / "checkpoints"
    steps = sorted(checkpoints.iterdir())
    assert len(steps) == 2
    shutil.rmtree(steps[1])
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        trap.set(steps[0] / name)
        trap.set(tmp_path / "run" / "checkpoint-2" / name)
    trap.set(steps[0] / "pytorch_model.bin")
    result = esft(*command, "--resume")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "delta" / WEIGHTS).read_bytes() == expected


def test_x1_pickles_for_data_selections_and_adapters(trap: Trap, tmp_path: Path) -> None:
    """Also a delta of pickled weights, and an adapter's under the name that PEFT falls back to."""
    names = ("scores.pt", "selection.pkl", "rows.pkl", "rows.pt", "rows.jsonl", "rows.parquet")
    for name in names:
        trap.set(tmp_path / "given" / name)
    given = tmp_path / "given"
    refused("select", given / "scores.pt", "--out", tmp_path / "selection.json")
    refused(*train(trap, tmp_path / "run", "--selection", given / "selection.pkl"))
    for name in names[2:]:
        refused("eval", trap.base, "--data", given / name)
    assert not (tmp_path / "run").exists()
    for method, weights, pickled in (
        ("esft", WEIGHTS, WEIGHTS),
        ("lora", "adapter_model.safetensors", "adapter_model.bin"),
    ):
        run = tmp_path / method
        assert esft(*train(trap, run, "--method", method)).returncode == 0
        delta = run / "delta"
        listed = json.loads((delta / CONFIG).read_text())
        (delta / weights).unlink()
        trap.set(delta / pickled)
        refused("merge", trap.base, delta, "--out", tmp_path / "merged")
        # Also where the manifest vouches for it.
        entry = {"bytes": (delta / pickled).stat().st_size, "sha256": sha256(delta / pickled)}
        listed["files"] = {pickled: entry}
        (delta / CONFIG).write_text(json.dumps(listed))
        refused("merge", trap.base, delta, "--out", tmp_path / "merged")
        refused("eval", trap.base, "--delta", delta, "--data", trap.data)
        assert not (tmp_path / "merged").exists()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()

"""A full disk: one line of error, exit code 1, nothing half-written, earlier work intact."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import save_tiny
from tests.command import esft

SIZE = 2 << 20  # of the disk; each folder and file takes whole pages of it

# Room for this many bytes, and no more, within the block.
Limit = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "base", "qwen3_moe")  # 260 kB
    (folder / "train.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n' * 4)
    return folder


@pytest.fixture(params=["disk", "file size"])
def limited(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Path, Limit, str, Callable[[], bool]]]:
    """A folder, how to limit it, what the error then says."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "file size":
        # For any user: no file may become longer. Python ignores the signal that goes with it.
        yield folder, largest_file, "cannot write: File too large"
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk here; the limit on file sizes is tested")
    try:

        @contextmanager
        def filled(room: int) -> Iterator[None]:
            space = os.statvfs(folder)
            filler = folder / "filler"
            with open(filler, "wb") as file:
                file.write(bytes(max(0, space.f_bavail * space.f_bsize - room)))
            try:
                yield
            finally:
                filler.unlink()

        yield folder, filled, "no space left on the disk"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(reason: str, *arguments: str | Path) -> str:
    """Run a command that must fail for lack of space; return its error."""
    result = esft(*arguments)
    assert result.returncode == 1, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error
    return error


def content(folder: Path) -> set[str]:
    """Every file and folder, half-written ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"filler"}


def test_profile(task: Path, limited: tuple[Path, Limit, str]) -> None:
    folder, limit, reason = limited
    (folder / "scores.json").write_text("old")
    options = ["--data", task / "train.jsonl", "--out", folder / "scores.json"]
    with limit(100):
        assert "scores.json: " in refused(reason, "profile", task / "base", *options)
    assert content(folder) == {"scores.json"}
    assert (folder / "scores.json").read_text() == "old"


def test_the_delta(task: Path, limited: tuple[Path, Limit, str]) -> None:
    folder, limit, reason = limited
    run = folder / "run"
    options = ["--data", task / "train.jsonl", "--method", "full", "--steps", "2", "--out", run]
    with limit(100_000):
        error = refused(reason, "train", task / "base", *options)
    assert "esft_delta.safetensors: " in error
    assert content(run) == {"metrics.jsonl", "recipe.yaml"}


def test_a_checkpoint_then_resume_with_room(
    task: Path, limited: tuple[Path, Limit, str], tmp_path: Path
) -> None:
    folder, limit, reason = limited
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {task / 'base'}\nmethod: full\ndata: {{train: {task / 'train.jsonl'}}}\n"
        "training: {max_steps: 3, save_strategy: steps, save_steps: 1}\n"
        "checkpoints: {keep_last: 9}\n"
    )
    whole = tmp_path / "whole"
    assert esft("train", recipe, "--out", whole).returncode == 0
    run = folder / "run"
    with limit(300_000):
        assert "step-00000" in refused(reason, "train", recipe, "--out", run)
    left = content(run)
    assert not [name for name in left if "delta" in name or ".step" in name or ".delta" in name]
    # Put a checkpoint there as a fuller disk would have let it: the next one does not fit.
    shutil.copytree(whole / "checkpoints" / "step-000001", run / "checkpoints" / "step-000001")
    before = {path.name: path.read_bytes() for path in run.glob("checkpoints/step-000001/*")}
    with limit(300_000):
        refused(reason, "train", recipe, "--out", run, "--resume")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    for name, data in before.items():
        assert (run / "checkpoints" / "step-000001" / name).read_bytes() == data
    shutil.rmtree(whole / "checkpoints")
    if folder.stat().st_dev == tmp_path.stat().st_dev:  # the small disk holds no third one
        assert esft("train", recipe, "--out", run, "--resume").returncode == 0
        name = "delta/esft_delta.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_merge(task: Path, limited: tuple[Path, Limit, str], tmp_path: Path) -> None:
    folder, limit, reason = limited
    for method in ("esft", "lora"):
        run = tmp_path / method
        options = ["--data", task / "train.jsonl", "--method", method, "--steps", "1"]
        assert esft("train", task / "base", *options, "--out", run).returncode == 0
        with limit(100_000):
            out = folder / "merged"
            refused(reason, "merge", task / "base", run / "delta", "--out", out)
        assert content(folder) == set()
        assert esft("merge", task / "base", run / "delta", "--out", out).returncode == 0
        shutil.rmtree(out)


def test_an_adapter(task: Path, limited: tuple[Path, Limit, str]) -> None:
    folder, limit, reason = limited
    options = ["--data", task / "train.jsonl", "--method", "lora", "--steps", "1"]
    with limit(50_000):
        refused(reason, "train", task / "base", *options, "--out", folder / "run")
    assert content(folder / "run") == {"metrics.jsonl", "recipe.yaml"}

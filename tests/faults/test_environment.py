"""E1 and E2: a disk that is full, broken or read-only, and two who want the same folder.

Beside the cases here, tests/cli/test_full_disk.py fills a real disk under every command.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import esft
from esft.run import checkpoint
from tests.checkpoints import save_tiny
from tests.faults.trainings import Trainings
from tests.resumed_runs import cut_back, delta_bytes, files_of, recipe, write_rows

STEPS = 4
# What a resumed run writes: what an error names, which write is to fail, and where the run stops
# just before it.
SITES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "log": ("metrics.jsonl", {"file": "metrics.jsonl"}, {}),
    "tensors": ("step-000004", {"place": "its tensors"}, {"place": "its tensors"}),
    "state": ("step-000004/state.json", {"file": ".state.json."}, {"place": "its state"}),
    "manifest": (
        "step-000004/manifest.json",
        {"file": ".manifest.json."},
        {"place": "its manifest"},
    ),
    "sync": ("step-000004", {"place": "a sync", "call": 3, "saves": 1}, {}),
    "delta": (
        "delta/esft_delta.safetensors",
        {"file": "esft_delta.safetensors"},
        {"place": "a delta's tensors"},
    ),
}
FULL = "no space left on the disk"
SAID = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EIO: "cannot write: Input/output error",
    errno.EROFS: "cannot write: Read-only file system",
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    with Trainings(tmp_path_factory.mktemp("trainings")) as started:
        yield started


@pytest.fixture(scope="module")
def complete(trainings: Trainings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete run of 4 steps, saved after 2 and 4, and its recipe."""
    folder = tmp_path_factory.mktemp("complete")
    save_tiny(folder / "base", "qwen3_moe")
    rows = write_rows(folder / "train.jsonl")
    wanted = recipe(folder / "base", rows, max_steps=STEPS)
    (folder / "recipe.json").write_text(json.dumps(wanted))
    assert trainings.run(wanted, folder / "run").code == 0
    return folder


@pytest.fixture
def wanted(complete: Path) -> dict[str, Any]:
    return json.loads((complete / "recipe.json").read_text())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder; on a disk of 4 MB where the machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    space = os.statvfs(folder)
    filler = folder / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(space.f_bavail * space.f_bsize))
    return filler


# `make test` fills every place, and has each of the other errors once; `make faults` has all.
ALL_E1 = [(site, number) for site in SITES for number in SAID]
PART_E1 = [(site, errno.ENOSPC) for site in SITES]
PART_E1 += [("log", errno.EDQUOT), ("manifest", errno.EIO), ("delta", errno.EROFS)]


@pytest.mark.parametrize(
    ("site", "number"), ALL_E1 if os.environ.get("ESFT_FAULTS") == "full" else PART_E1
)
def test_e1_a_write_fails(
    trainings: Trainings,
    complete: Path,
    wanted: dict[str, Any],
    small_disk: Path,
    site: str,
    number: int,
) -> None:
    run = small_disk / "run"
    shutil.copytree(complete / "run", run)
    cut_back(run, 2)
    old = files_of(run / "checkpoints" / "step-000002")
    named, failing, before = SITES[site]
    # A line may still fit into a log's last page; a sync needs no room on the disk made here.
    really_full = number == errno.ENOSPC and before and small_disk.is_mount()
    if really_full:
        started = trainings.start(wanted, run, resume=True, stops=[before])
        assert started.paused()
        filler = fill(small_disk)
        started.go()
        code, output = started.wait()
        filler.unlink()
    else:
        code, output = trainings.run(wanted, run, resume=True, stops=[failing | {"errno": number}])
    assert code == 1, output
    assert "Traceback" not in output
    error = output.splitlines()[-1]
    assert error.startswith(f"error: {run}/")
    assert f"{named}: {SAID[number]}" in error
    if SAID[number] == FULL:
        assert "bytes needed); nothing kept" in error
        assert int(error.split("(")[1].split(" ")[0].replace(",", "")) > 0
    # What was there is as it was; of what was being written there is nothing, not even hidden.
    assert files_of(run / "checkpoints" / "step-000002") == old
    steps = [2, 4] if site == "delta" else [2]
    assert [saved.step for saved in checkpoint.complete(run / "checkpoints")] == steps
    assert not (run / "delta").exists()
    assert [path.name for path in run.rglob(".*")] == []
    if really_full or number == errno.EIO:
        assert trainings.run(wanted, run, resume=True).code == 0
        assert delta_bytes(run) == delta_bytes(complete / "run")


def test_e2_two_begin_the_same_run(
    trainings: Trainings, complete: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = trainings.start(wanted, run, stops=[{"place": "a batch", "call": 1}])
    assert first.paused()
    before = files_of(run)
    for resume in (False, True):
        code, output = trainings.run(wanted, run, resume=resume)
        assert code == 1
        assert output.startswith(
            f"error: {run}: process {first.pid} on {socket.gethostname()} has been writing this run"
        )
        assert files_of(run) == before
    first.go()
    assert first.wait().code == 0
    assert delta_bytes(run) == delta_bytes(complete / "run")


def test_e2_two_begin_at_the_same_moment(
    trainings: Trainings, complete: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """Whoever has the lock wins, be it before its file says whose it is."""
    run = tmp_path / "run"
    stops = [{"place": "the lock's signature"}]
    first = trainings.start(wanted, run, stops=stops)
    assert first.paused()
    second = trainings.run(wanted, run)
    assert second.code == 1
    assert second.output.startswith(f"error: {run}: another process is writing this run")
    first.go()
    assert first.wait().code == 0
    assert delta_bytes(run) == delta_bytes(complete / "run")


def test_e2_the_lock_of_a_killed_run(
    trainings: Trainings, complete: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainings.kill(wanted, run, stops=[{"place": "a batch", "call": 3}])
    assert (run / ".lock").is_file()
    assert trainings.run(wanted, run, resume=True).code == 0
    assert not (run / ".lock").exists()
    assert delta_bytes(run) == delta_bytes(complete / "run")


def test_e2_the_lock_of_another_machine(
    trainings: Trainings, complete: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """A run killed there, its folder copied here."""
    run = tmp_path / "run"
    shutil.copytree(complete / "run", run)
    cut_back(run, 2)
    (run / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "2026-11-01T00:00:00"}')
    assert trainings.run(wanted, run, resume=True).code == 0
    assert delta_bytes(run) == delta_bytes(complete / "run")


def reading(look: Callable[[], None]) -> tuple[threading.Event, threading.Thread, list[Any]]:
    """Look again and again, in this process, while another writes."""
    stop, seen = threading.Event(), []

    def loop() -> None:
        while not stop.is_set():
            try:
                seen.append(look())
            except Exception as error:  # told to the test
                seen.append(error)
            stop.wait(0.001)

    thread = threading.Thread(target=loop)
    thread.start()
    return stop, thread, seen


def test_e2_checkpoints_are_read_while_they_come_and_go(
    trainings: Trainings, wanted: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    wanted = wanted | {"checkpoints": {"keep_last": 1}}
    wanted["training"] = wanted["training"] | {"max_steps": 12, "save_steps": 1}

    def look() -> int | None:
        saved = checkpoint.last(run / "checkpoints")
        if saved is None:
            return None
        try:
            saved.check()
        except (esft.errors.CheckError, FileNotFoundError):
            # Deleted meanwhile, as a whole: not there is no harm, half there would be.
            assert not saved.folder.exists()
        return saved.step

    stop, thread, seen = reading(look)
    ended = trainings.run(wanted, run)
    stop.set()
    thread.join()
    assert ended.code == 0, ended.output
    assert not [what for what in seen if isinstance(what, Exception)]
    steps = [step for step in seen if step is not None]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3


def test_e2_a_delta_is_read_while_it_appears(
    trainings: Trainings, complete: Path, wanted: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def look() -> bool:
        if not (run / "delta").exists():
            return False
        esft.verify(complete / "base", run / "delta")
        return True

    started = trainings.start(wanted, run, stops=[{"place": "a rename", "call": 2}])
    stop, thread, seen = reading(look)
    assert started.paused()
    assert not (run / "delta").exists()
    started.go()
    assert started.wait().code == 0
    while not (seen and seen[-1]):
        stop.wait(0.001)
    stop.set()
    thread.join()
    assert not [what for what in seen if isinstance(what, Exception)]

"""A process dies or falls silent in the middle of a step: the others end and say what is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import esft
from tests.checkpoints import save_tiny
from tests.distributed.launcher import ROOT, run, told
from tests.distributed.splits import curve, split
from tests.resumed_runs import write_rows

pytestmark = pytest.mark.slow
STEP, SAVED = 6, 4  # that one dies in; checkpoints are of even steps
LIMIT = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    save_tiny(folder / "tiny", "qwen3_moe")
    write_rows(folder / "train.jsonl")
    wanted = split(folder, {"batch": 2, "save_strategy": "steps"}) | {"device": "cpu"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(wanted))
    return folder


def check_it_goes_on(folder: Path, out: Path) -> None:
    """By one process; with the curve of a run that nothing happened to."""
    options = {"batch": 2, "accumulated": 2, "save_strategy": "steps"}
    wanted = split(folder, options) | {"device": "cpu"}
    esft.train(wanted, out, resume=True)
    if not (folder / "whole").exists():
        esft.train(wanted, folder / "whole")
    assert curve(out) == pytest.approx(curve(folder / "whole"), abs=1e-5)
    assert not any(path.name.startswith(".") for path in (out / "checkpoints").iterdir())


def test_killed_under_torchrun(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launched = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    dying = ["-m", "tests.distributed.dying", "killed", str(STEP)]
    command = ["train", str(folder / "recipe.yaml"), "--out", str(out)]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))
    ended = subprocess.run(
        [sys.executable, *launched, *dying, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert ended.returncode == 1, ended.stderr
    assert "(exitcode: -9)" in ended.stderr, "torchrun names the one that was killed"
    # The other one was told by the broken connection, or first ended by torchrun.
    told_by_it = "another process ended" in ended.stderr or "interrupted by" in ended.stderr
    assert told_by_it, ended.stderr
    assert f"step {SAVED} is saved; go on as it was launched, with: " in ended.stderr
    check_it_goes_on(folder, out)


def test_one_that_does_not_answer_is_given_up_in_time(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["train", str(folder / "recipe.yaml"), "--out", str(out)]
    first, silent = run(
        ["-m", "tests.distributed.dying", "silent", str(STEP), *command],
        tmp_path / "outputs",
        limit=90,
        environment={"ESFT_TIMEOUT": "20"},
    )
    assert first.code == 1, told([first, silent])
    assert silent.code is None, "it sleeps on"
    error = first.stderr.splitlines()[-1]
    assert error.startswith(
        "error: process 0 of 2: another process ended, or did not answer within"
    )
    assert "20 s (ESFT_TIMEOUT)" in error
    assert f"step {SAVED} is saved; go on as it was launched, with: " in error
    check_it_goes_on(folder, out)

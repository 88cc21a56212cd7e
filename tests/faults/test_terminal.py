"""E5: no terminal, no colours, a dumb or narrow one, another encoding, nobody who reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from esft import generate
from esft.errors import DataError
from esft.progress import ConsoleReporter
from tests.checkpoints import save_tiny
from tests.command import ROOT, Argument, esft, esft_process
from tests.deltas import WEIGHTS
from tests.terminal import WIDTH, Shown, esft_in_pipe, esft_in_terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7]|38;5)[0-9;]*m")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `base`, and rows with letters that not every encoding has."""
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "base")
    rows = [{"prompt": f"{n} 日本 é:", "completion": "ü😀"} for n in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text)
    # What is imported now, the forks below need not import.
    assert esft(*preview(folder)).returncode == 0
    return folder


def preview(task: Path) -> list[Argument]:
    return ["data", "preview", task / "base", "--data", task / "rows.jsonl", "--rows", 1, "--stats"]


def train(task: Path, run: Path) -> list[Argument]:
    options: list[Argument] = ["--steps", 2, "--set", "data.max_length=64", "--out", run]
    return ["train", task / "base", "--data", task / "rows.jsonl", *options]


def check(shown: Shown) -> None:
    assert shown.code == 0, shown.err
    assert "Traceback" not in shown.out + shown.err


def test_e5_no_terminal(task: Path) -> None:
    """Lines, one after the other: nothing moves, nothing is coloured, nothing is drawn over."""
    for command in (preview(task), [*preview(task), "--json"], ["inspect", task / "base"]):
        shown = esft_in_pipe(*command)
        check(shown)
        for text in (shown.out, shown.err):
            assert "\x1b" not in text
            assert "\r" not in text
        if "--json" in command:
            assert len(shown.out.splitlines()) == 1
    assert "{+ü😀{=</s>=}+}" in esft_in_pipe(*preview(task)).out


def test_e5_no_color(task: Path) -> None:
    coloured = esft_in_terminal(*preview(task))
    check(coloured)
    assert COLOUR.search(coloured.out)
    plain = esft_in_terminal(*preview(task), NO_COLOR="1")
    check(plain)
    assert not COLOUR.search(plain.out + plain.err)
    assert "{+ü😀{=</s>=}+}" in plain.out


def test_e5_a_dumb_terminal(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (preview(task), ["inspect", task / "base"], ["--help"]):
        shown = esft_in_terminal(*command, TERM="dumb")
        check(shown)
        assert "\x1b" not in shown.out + shown.err
    # What a run shows while it works are lines there, as in a file.
    dumb = Console(stderr=True, force_terminal=True, _environ={"TERM": "dumb"})
    with ConsoleReporter(dumb).task("training", total=2, unit="step") as steps:
        steps.advance(2)
    assert capsys.readouterr().err == "training: 2/2 steps\n"


def test_e5_forty_columns(task: Path) -> None:
    for command in (preview(task), ["inspect", task / "base"]):
        shown = esft_in_terminal(*command)
        check(shown)
        # A path is not broken; whatever is set in columns fits, and is all there.
        lines = [ESCAPE.sub("", line) for line in shown.out.splitlines()]
        wide = [line for line in lines if len(line.rstrip()) > WIDTH]
        assert all("/" in line for line in wide), wide
        assert not any("…" in line for line in lines), lines
    text = re.sub(r"\s+", " ", ESCAPE.sub("", esft_in_terminal(*preview(task)).out))
    assert "rows repeat an earlier" in text


def test_e5_an_encoding_without_these_letters(task: Path) -> None:
    """In a process of its own: Python chooses its encodings when it starts."""
    names = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = esft_process(*preview(task), **names, PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stderr
    assert (shown.stdout + shown.stderr).isascii()
    assert r"{+\xfc\U0001f600{=</s>=}+}" in shown.stdout
    with pytest.raises(DataError, match="--prompt: not text in this locale's encoding"):
        generate(task / "base", os.fsencode("日本").decode("ascii", "surrogateescape"))


def test_e5_nobody_reads(task: Path, tmp_path: Path) -> None:
    # Nobody reads the results: no error is anybody's, and none is shown.
    for command in (preview(task), [*preview(task), "--json"], ["inspect", task / "base"]):
        shown = esft_in_pipe(*command, readers_gone="out")
        assert shown.code == 1
        assert "Traceback" not in shown.err
        assert "error" not in shown.err
    shown = esft_in_pipe(*preview(task), readers_gone="err")
    assert shown.code == 0
    assert "statistics" in shown.out
    # Users' shells: a run that nobody watches goes on, streams are closed, a disk is full.
    run = " ".join(f"'{argument}'" for argument in train(task, tmp_path / "run"))
    command = f"'{sys.executable}' -m esft_cli"
    script = (
        f"{command} {run} 2>&1 | :; {command} --help >&- 2>&-; echo $?\n"
        f"{command} --help 2>&1 >/dev/full; echo $?"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines() == [
        "0",
        "error: cannot write the output: No space left on device",
        "1",
    ]
    assert ran.stderr == ""
    assert (tmp_path / "run" / "delta" / WEIGHTS).is_file()

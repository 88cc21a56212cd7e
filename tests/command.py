"""Runs the `esft` command through its entry point, here or in a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from esft_cli import main

ROOT = Path(__file__).parents[1]
Result = subprocess.CompletedProcess[str]
Argument = str | Path | float


def esft(*arguments: Argument) -> Result:
    """Run `esft ARGUMENTS` in this process, which has torch imported already."""
    command = ["esft", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with mock.patch.object(sys, "argv", command), redirect_stdout(out), redirect_stderr(err):
        try:
            main.run()
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def esft_process(*arguments: Argument, timeout: float = 300, **environment: str) -> Result:
    """Run `esft ARGUMENTS` from the source tree in a process of its own, as a user does."""
    return python_process("-m", "esft_cli", *arguments, timeout=timeout, **environment)


def python_process(*arguments: Argument, timeout: float = 300, **environment: str) -> Result:
    """Run `python ARGUMENTS` with the source tree importable."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))
    fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **fixed, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def esft_json(*arguments: Argument) -> Any:
    """Run `esft ARGUMENTS --json`, which must succeed, and return the object that it printed."""
    result = esft(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments: Argument, code: int = 1) -> str:
    """Run `esft ARGUMENTS`, which must exit with `code` and print one line of error; return it.

    Before it may only stand what was read, a line a source: `train.jsonl: text, 7 rows`.
    """
    result = esft(*arguments)
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout == ""
    *read, error = result.stderr.splitlines()
    assert all(re.fullmatch(r".+: [a-z-]+, [\d,]+ rows?", line) for line in read), result.stderr
    assert error.startswith("error: ")
    return error

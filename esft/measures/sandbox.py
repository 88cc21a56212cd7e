"""Runs code that a model wrote, confined: see docs/eval.md for what that does not protect from."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from esft.errors import EsftError

_JAIL = Path(__file__).with_name("jail.py")
_GRACE = 30.0  # seconds that starting and ending may take on a busy machine
MEMORY = 1 << 30  # bytes of address space of each process


class Verdict(NamedTuple):
    """What came of a program: whether its tests passed, and if not, why."""

    passed: bool
    why: str


def run_tests(answer: str, tests: str, *, seconds: float = 10.0) -> Verdict:
    """Run code and then its tests, in a Python of their own; they pass if both end.

    Args:
        answer: Python code.
        tests: code that raises if the answer is wrong; it sees the answer's names.
        seconds: after which both are killed, with all that they started.

    Raises:
        EsftError: no Python can be run in the sandbox here.
    """
    _check_works()
    return _run(answer, tests, seconds)


@functools.cache
def _check_works() -> None:
    """Run what must pass: a sandbox that no program can run in would look like bad answers."""
    found = _run("def one():\n    return 1", "assert one() == 1", _GRACE)
    if not found.passed:
        raise EsftError(f"pass_at_1: the sandbox cannot run Python on this machine: {found.why}")


def _run(answer: str, tests: str, seconds: float) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="esft-code-", ignore_cleanup_errors=True) as folder:
        program = {"answer": answer, "tests": tests, "token": secrets.token_hex(16)}
        Path(folder, "program.json").write_text(json.dumps(program), encoding="utf-8")
        job = {"seconds": seconds, "memory": MEMORY, "readable": _readable()}
        supervisor = subprocess.Popen(
            [sys.executable, "-I", str(_JAIL), json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            # Nothing of this process's: it may hold access tokens.
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = supervisor.communicate(timeout=seconds + _GRACE)
            return Verdict(**json.loads(said))
        except subprocess.TimeoutExpired:
            return Verdict(False, f"could not be ended after {seconds:g} s")
        except (ValueError, TypeError):
            return Verdict(False, "ended the process that watched it")
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(supervisor.pid, signal.SIGKILL)
            supervisor.communicate()


def _readable() -> list[str]:
    """Return where Python and its libraries lie."""
    python = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent)]
    return [*python, "/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime"]

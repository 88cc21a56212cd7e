"""Training runs in processes of their own, for tests that kill them or let their writes fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.command import ROOT

SERVER = Path(__file__).with_name("training_server.py")


class Ended(NamedTuple):
    """How a command ended: its exit code (minus the signal's number), and what it printed."""

    code: int
    output: str


class Run:
    """A command that runs in a process of its own."""

    def __init__(self, trainings: Trainings, pid: int, log: Path) -> None:
        self._trainings, self.pid, self._log = trainings, pid, log

    def paused(self) -> bool:
        """Wait until it has come to its place; false if it ended before."""
        return self._trainings.ask(do="paused", pid=self.pid)

    def go(self) -> None:
        """Let it go on."""
        self._trainings.ask(do="go", pid=self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        code = self._trainings.ask(do="wait", pid=self.pid)
        return Ended(code, self._log.read_text())


class Trainings:
    """Starts commands in processes forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))
        fixed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **fixed, "TRITON_INTERPRET": "0"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def ask(self, **request: Any) -> Any:
        """Send the server a request and return its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        recipe: dict[str, Any],
        out: Path,
        *,
        resume: bool = False,
        stops: Sequence[dict[str, Any]] = (),
        **environment: str,
    ) -> Run:
        """Start `esft train`.

        Args:
            recipe: its keys.
            out: the run's folder.
            resume: give `--resume`.
            stops: where to stop, or to fail: `place` (see the server's `PLACES`), `errno` (fail
                with it), and the arguments of the server's `stop_before`.
            environment: variables of the process.
        """
        self._count += 1
        file = self._folder / f"{self._count}.json"
        file.write_text(json.dumps(recipe))
        log = file.with_suffix(".log")
        recipe_file = file.rename(file.with_suffix(".yaml"))  # JSON is YAML
        arguments = ["train", str(recipe_file), "--out", str(out), *["--resume"] * resume]
        pid = self.ask(
            do="start",
            arguments=arguments,
            log=str(log),
            stops=list(stops),
            environment=environment,
        )
        return Run(self, pid, log)

    def run(self, recipe: dict[str, Any], out: Path, **options: Any) -> Ended:
        """Start `esft train` and wait for its end."""
        return self.start(recipe, out, **options).wait()

    def kill(self, recipe: dict[str, Any], out: Path, **options: Any) -> None:
        """Start `esft train` and kill it with SIGKILL where it stops."""
        run = self.start(recipe, out, **options)
        assert run.paused(), run.wait()
        run.send(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL

"""Start several real processes, as torchrun would, and collect what they say and return.

Importing torch and transformers costs seconds a process: write scenarios as functions of a module
and run many of them in one launch, from a fixture of module scope; each test then asserts its own
scenario's results. A scenario takes its folder, shared by the processes, and returns what JSON can
hold; a function whose name starts with an underscore is none. Run as a program, this file is one of
those processes.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 120.0  # seconds until what still runs is killed
_PATH = os.pathsep.join(str(ROOT / folder) for folder in (".", "cli", "kernels", "tests"))


@dataclass(frozen=True)
class Ended:
    """What became of one process. `code` is None if it had to be killed at the limit."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Launch:
    """What became of scenarios: processes by rank, and the folder with their results."""

    folder: Path
    ended: list[Ended]

    def results(self, scenario: str) -> list[Any]:
        """Return what a scenario returned, by rank; fail with all outputs where it did not."""
        return [self.result(scenario, rank) for rank in range(len(self.ended))]

    def result(self, scenario: str, rank: int) -> Any:
        """Return what a scenario returned in one process; in another it may not have ended."""
        file = self.folder / f"{scenario}.{rank}.json"
        assert file.is_file(), told(self.ended)
        return json.loads(file.read_text())


def run(
    command: Sequence[str],
    folder: Path,
    *,
    processes: int = 2,
    limit: float = LIMIT,
    environment: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Start a command in several processes with torchrun's environment and wait for them all.

    No process is ended because another one was: what they do then is for the test to see.

    Args:
        command: after the interpreter, e.g. `["-m", "esft_cli", "profile", ...]`.
        folder: for the outputs, `stdout.<rank>` and `stderr.<rank>`.
        processes: how many.
        limit: seconds until those that still run are killed, with all that they started.
        environment: variables besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = str(_free_port())
    started, files = [], []
    begun = time.monotonic()
    for rank in range(processes):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _PATH])),
        }
        out, err = folder / f"stdout.{rank}", folder / f"stderr.{rank}"
        files.append((out, err))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=os.environ | own | dict(environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            )
    seconds = _wait(started, begun, limit)
    return [
        Ended(
            None if process.returncode == -signal.SIGKILL and took is None else process.returncode,
            out.read_text(errors="replace"),
            err.read_text(errors="replace"),
            limit if took is None else took,
        )
        for process, (out, err), took in zip(started, files, seconds, strict=True)
    ]


def run_scenarios(
    module: str,
    folder: Path,
    *names: str,
    processes: int = 2,
    limit: float = LIMIT,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """Run a module's scenarios in several processes that form one gloo group.

    Args:
        module: such as `tests.distributed.some_scenarios`.
        folder: each scenario gets a folder of its name in it; results are `<name>.<rank>.json`.
        names: scenarios; all of the module if none is named, in their order in the file.
        processes: how many.
        limit: seconds until those that still run are killed.
        environment: variables besides.
    """
    program = ["-m", "tests.distributed.launcher", module, str(folder), *names]
    ended = run(program, folder, processes=processes, limit=limit, environment=environment)
    return Launch(folder, ended)


def told(ended: Sequence[Ended]) -> str:
    """Write out what processes said, for the message of an assertion."""
    parts = [
        f"--- rank {rank}: exit code {end.code} after {end.seconds:.1f} s\n{end.stdout}{end.stderr}"
        for rank, end in enumerate(ended)
    ]
    return "\n".join(["", *parts])


def _wait(
    started: Sequence[subprocess.Popen[bytes]], begun: float, limit: float
) -> list[float | None]:
    """Wait for processes and return the seconds that each took; None for one that was killed."""
    seconds: list[float | None] = [None] * len(started)
    try:
        while time.monotonic() - begun < limit:
            for rank, process in enumerate(started):
                if seconds[rank] is None and process.poll() is not None:
                    seconds[rank] = time.monotonic() - begun
            if None not in seconds:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            try:  # the whole session of it; it may have left children though it ended itself
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in started:
            process.wait()
    return seconds


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _scenarios(module: str) -> dict[str, Callable[[Path], Any]]:
    found = vars(importlib.import_module(module)).items()
    return {
        name: value
        for name, value in found
        if inspect.isfunction(value) and value.__module__ == module and not name.startswith("_")
    }


def _main(module: str, folder: Path, *names: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    scenarios = _scenarios(module)
    for name in names or scenarios:
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            result = scenarios[name](own)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once: the others learn of it by the broken connection
        (folder / f"{name}.{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

"""Runs `esft train` in processes forked after the imports, which stop or fail where they are told.

Run as a script. Each line on stdin is a request in JSON, each line on stdout its answer:
`start` forks a process that runs the command line's entry point and answers its id; `paused` waits
until a process has come to its place; `go` lets it go on; `wait` waits for its end. The processes
are real, so that signals, and what the kernel does at an end, are real, too.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from esft_cli import main as command
from safetensors import SafetensorError

from esft import delta, files, manifest, shard_writer
from esft.run import checkpoint, choice, lock, log, trainer

# Functions that a process can be stopped before: where in the run they are called is their name.
PLACES: dict[str, tuple[Any, str]] = {
    "profiling": (choice, "profile_model"),
    "a batch": (trainer.EsftTrainer, "training_step"),
    "an evaluation": (trainer.EsftTrainer, "evaluate"),
    "a logged line": (log, "append_line"),
    "a checkpoint": (checkpoint, "save"),
    "its folder": (checkpoint, "new_folder"),
    "its tensors": (checkpoint, "save_file"),
    "its state": (checkpoint, "write_text"),
    "its manifest": (checkpoint, "write_json"),
    "a sync": (files, "sync_file"),
    "a rename": (files, "_swap"),
    "a sync of a folder": (files, "sync_folder"),
    "a deletion": (checkpoint, "remove_folder"),
    "a deletion of what is hidden": (files.shutil, "rmtree"),
    "a delta's tensors": (delta, "write_shards"),
    "a delta's manifest": (manifest, "write_json"),
    "the lock's signature": (lock, "_signature"),
}


def stop_before(
    place: str, stop: Callable[[], None], *, call: int = 0, saves: int = 0, half: bool = False
) -> None:
    """Call `stop` before a place's function is called.

    Args:
        place: of `PLACES`.
        stop: may raise.
        call: at which call, from 0.
        saves: count calls only once so many checkpoints have been begun.
        half: of a function that writes a file: stop after half of it is written.
    """
    begun = 0
    if saves:
        save = checkpoint.save

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal begun
            begun += 1
            return save(*arguments, **options)

        checkpoint.save = counted
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), 0

    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += begun >= saves
        if calls - 1 == call and begun >= saves:
            if half:
                original(*arguments, **options)
                file = Path(arguments[1])
                os.truncate(file, file.stat().st_size // 2)
            stop()
        return original(*arguments, **options)

    setattr(owner, name, wrapper)


def fail(number: int, *, safetensors: bool = False) -> None:
    error = OSError(number, os.strerror(number))
    if safetensors:  # it keeps the system's error only in its text
        raise SafetensorError(f"I/O error: {error.strerror} (os error {number})")
    raise error


class Broken:
    """A file whose disk fails as soon as something is written."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._number = file, number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, _: object) -> None:
        fail(self._number)


def break_file(name: str, number: int) -> None:
    """Let writes to files fail whose path has `name` in it."""

    def opened(path: Any, mode: str = "r", **options: Any) -> Any:
        writes = name in str(path) and mode != "rb"
        if writes and number == errno.EROFS:
            fail(number)
        file = open(path, mode, **options)  # noqa: SIM115 (the caller closes it)
        return Broken(file, number) if writes else file

    for module in (files, shard_writer):
        module.open = opened  # type: ignore[attr-defined]


class Process:
    """A command that runs in a forked process."""

    def __init__(self, request: dict[str, Any]) -> None:
        reports, self._report = os.pipe()
        self._orders, go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reports)
            os.close(go)
            self._run(request)
        os.close(self._report)
        os.close(self._orders)
        self._reports, self._go = reports, go

    def _run(self, request: dict[str, Any]) -> None:
        output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(request.get("environment", {}))
        # PyTorch's pool of threads did not come along; several threads that ask for a new one at
        # the same time, as those that load a model do, may find none.
        torch.set_num_threads(1)
        for where in request["stops"]:
            number = where.pop("errno", None)
            if "file" in where:
                break_file(where["file"], number)
                continue
            place = where.pop("place")
            failing = partial(fail, number, safetensors=place == "its tensors")
            stop_before(place, self._pause if number is None else failing, **where)
        sys.argv = ["esft", *request["arguments"]]
        code: Any = 0
        try:
            command.run()
        except SystemExit as end:
            code = end.code or 0
        except BaseException:  # a test wants to see it
            sys.excepthook(*sys.exc_info())
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _pause(self) -> None:
        os.write(self._report, b".")
        os.read(self._orders, 1)

    def paused(self) -> bool:
        """Wait until it has stopped at its place; false if it ended before that."""
        return os.read(self._reports, 1) == b"."

    def go(self) -> None:
        os.write(self._go, b".")

    def wait(self) -> int:
        """Wait for its end; return its exit code, or the signal's number, negative."""
        status = os.waitpid(self.pid, 0)[1]
        os.close(self._reports)
        os.close(self._go)
        return os.waitstatus_to_exitcode(status)


def main() -> None:
    torch.set_num_threads(1)
    processes: dict[int, Process] = {}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        what = request["do"]
        if what == "start":
            process = Process(request)
            processes[process.pid] = process
            answer: Any = process.pid
        else:
            answer = getattr(processes[request["pid"]], what)()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

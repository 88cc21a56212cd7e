"""Several workers that take jobs from one queue."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_PATIENCE = 30.0  # seconds that a run gets to save a checkpoint when it is ended


class Pool:
    """Workers, each one process that forks for a job. Use it in a `with` statement.

    Args:
        jobs: how many run at a time.
        devices: GPUs to give to workers in turn, by number; none where there are none to share.
    """

    def __init__(self, jobs: int, devices: int = 0) -> None:
        self._threads = _threads_each(jobs)
        self._devices = devices
        self._jobs = jobs
        self._workers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, jobs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, int]]:
        """Run jobs, as many at a time as there are workers.

        Args:
            jobs: each as `esft.comparison.jobs.run_job` takes it, with `log` and `failure`.

        Yields:
            the place of a job that has ended, and its exit code; negative for a signal.
        """
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for place in range(len(jobs)):
            todo.put(place)
        count = min(self._jobs, len(jobs))
        while len(self._workers) < count:
            self._workers.append(_start())
        threads = [
            threading.Thread(target=self._work, args=(number, jobs, todo, done), daemon=True)
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for _ in jobs:
            # With a time limit Python looks at signals in between.
            while True:
                with contextlib.suppress(queue.Empty):
                    ended = done.get(timeout=0.5)
                    break
            yield ended

    def _work(
        self,
        number: int,
        jobs: Sequence[Mapping[str, Any]],
        todo: queue.SimpleQueue[int],
        done: queue.SimpleQueue[tuple[int, int]],
    ) -> None:
        environment = {}
        if self._devices and self._jobs > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(number % self._devices)
        while True:
            try:
                place = todo.get_nowait()
            except queue.Empty:
                return
            job = {**jobs[place], "environment": environment, "threads": self._threads}
            code = _ask(self._workers[number], job)
            if code is None:  # the worker itself was killed; the next job gets another
                code = self._workers[number].wait()
                self._workers[number] = _start()
            done.put((place, code))

    def _end(self) -> None:
        """End all workers and, by that, their jobs; one that does not end in time is killed."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                assert worker.stdin is not None
                worker.stdin.close()
        deadline = time.monotonic() + _PATIENCE
        for worker in self._workers:
            try:
                worker.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esft.comparison.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
        text=True,
        start_new_session=True,
    )


def _ask(worker: subprocess.Popen[str], job: Mapping[str, Any]) -> int | None:
    """Give a worker a job and wait for its end; None if the worker is gone."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        print(json.dumps(job), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
    except (OSError, ValueError):  # ValueError: the pipe was closed, the comparison ends
        return None
    return int(json.loads(answer)["code"]) if answer else None


def _threads_each(jobs: int) -> int:
    """Return how many threads a job may use: what the user says, or an even share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return max(len(os.sched_getaffinity(0)) // jobs, 1)

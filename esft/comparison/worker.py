"""A process that runs a comparison's jobs, each in a fork of its own.

A fork begins with all libraries imported, and ends with all of its memory given back, so that runs
neither wait for imports nor disturb each other, and one that is killed does not take others along.
It is started as `python -m esft.comparison.worker` by `esft.comparison.pool`: a JSON line on stdin
is a job, a JSON line on stdout says how it ended. When stdin ends while a job runs, whoever
started the worker is gone, and the job is ended, too.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from esft.comparison.jobs import run_job
from esft.errors import EsftError
from esft.files import write_json
from esft.run.interruption import Interrupted
from esft.secrets import redact

_LOOK = 0.1  # seconds between looks at a job and at stdin


def serve(jobs: TextIO, results: TextIO) -> None:
    """Run jobs until there are no more."""
    while line := jobs.readline():
        ended = _forked(json.loads(line), jobs)
        if ended is None:
            return
        print(json.dumps(ended), file=results, flush=True)


def _forked(job: Mapping[str, Any], jobs: TextIO) -> dict[str, Any] | None:
    """Run a job in a fork; return how that ended, or None if nobody wants to know any more."""
    child = os.fork()
    if not child:
        os._exit(_in_child(job))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status)}
        # There is no second job before the first has ended: what can be read is the end.
        if select.select([jobs], [], [], _LOOK)[0]:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            return None


def _in_child(job: Mapping[str, Any]) -> int:
    """Run a job, its output into its log; return the exit code."""
    # As in a program that was started by itself: the worker leaves signals to its children.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    log = Path(job["log"])
    with (
        log.open("a", encoding="utf-8") as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        try:
            os.environ.update(job["environment"])
            import torch

            torch.set_num_threads(job["threads"])
            run_job(job)
        except Interrupted as interrupted:
            return int(interrupted.code or 1)
        except KeyboardInterrupt:
            return 130
        except BaseException as error:
            traceback.print_exc()
            text = (
                str(error) if isinstance(error, EsftError) else f"{type(error).__name__}: {error}"
            )
            write_json(Path(job["failure"]), {"error": redact(text), "log": str(log)})
            return 1
        return 0


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)

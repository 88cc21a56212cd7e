"""Bounds for chat templates, which are programs that come with a checkpoint.

jinja's sandbox, in which transformers renders them, keeps a template away from files, from the
network and from Python's own objects. It does not keep it from running for ever or from filling
the memory. A child process does: the kernel stops it at a limit, whatever it is busy with.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from esft.errors import DataError

SECONDS = 10  # of processor time for one item; rendering a long conversation takes milliseconds
MEMORY = 2**30  # bytes that the child may take beyond what the process has already
CHARACTERS = 20_000_000  # of one text; no model reads one that comes near it

T = TypeVar("T")


def bounded(
    work: Callable[[T], Any], items: Sequence[T], where: Callable[[T], str]
) -> Iterator[Any]:
    """Run `work` on each item in a child process; yield what it returned, or why it did not.

    An item that goes beyond the bounds costs only itself: the next one starts another child.

    Args:
        work: renders; returns what JSON has. May raise `DataError`. What it changes in memory is
            lost.
        items: what to call it with, one by one.
        where: names an item, for messages.

    Yields:
        In the order of the items, each one's result, or the `DataError` that stands for it.
    """
    done = 0
    while done < len(items):
        pid, pipe = _fork(work, items[done:])
        status = 0
        try:
            for line in pipe:
                if line.endswith("\n"):  # or the child was stopped while it wrote
                    yield _read(line, where(items[done]))
                    done += 1
        finally:
            # The child has ended, unless nobody wants the rest of what it does.
            pipe.close()
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        if done < len(items):
            yield DataError(f"{where(items[done])}: {_why_it_died(status)}")
            done += 1


def check_length(text: str) -> str:
    """Return a rendered text, unless it is absurdly long.

    Raises:
        ValueError: it has more than `CHARACTERS` characters.
    """
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes {len(text):,} characters of them; {CHARACTERS:,} are enough")
    return text


def _fork(work: Callable[[T], Any], items: Sequence[T]) -> tuple[int, Any]:
    """Start a child that works on the items; return its id and a file of its lines."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on: locks that other threads hold stay shut in a fork. The child needs
        # none of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
                signal.signal(number, signal.SIG_DFL)  # what the parent does with it is its own
            with os.fdopen(writer, "w", encoding="ascii") as lines:
                _work(work, items, lines)
        finally:
            os._exit(0)  # without the parent's clean-up
    os.close(writer)
    return pid, os.fdopen(reader, encoding="ascii")


def _work(work: Callable[[T], Any], items: Sequence[T], lines: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (held := _address_space()) is not None:
        _limit(resource.RLIMIT_AS, held + MEMORY)
    for item in items:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS)
        try:
            line = json.dumps({"value": work(item)})
        except DataError as error:
            line = json.dumps({"refused": str(error)})
        except MemoryError:
            line = json.dumps({"memory": MEMORY})
        except Exception:
            line = json.dumps({"failed": traceback.format_exc()})
        lines.write(line + "\n")
        lines.flush()


def _limit(which: int, value: int) -> None:
    """Lower a limit of this process; one that is lower already stays."""
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int | None:
    """Return how many bytes of addresses this process has; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _read(line: str, where: str) -> Any:
    kind, value = json.loads(line).popitem()
    if kind == "failed":
        raise RuntimeError(f"{where}: rendering failed in the child process:\n{value}")
    if kind == "refused":
        return DataError(value)
    if kind == "memory":
        return DataError(f"{where}: the chat template wants more than {value:,} bytes of memory")
    return value


def _why_it_died(status: int) -> str:
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGXCPU:
        return f"the chat template is not done after {SECONDS} s of processor time; mend it"
    return f"the process that rendered the chat template ended early (signal {number})"

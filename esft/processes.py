"""The processes that a program was launched as, and what they tell each other.

`torchrun` and `accelerate launch` start the same program several times and number the processes in
their environment. Everything here also works in a process that is alone, and does nothing then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from esft.errors import ElsewhereError, EsftError, LostProcessError

TIMEOUT = "ESFT_TIMEOUT"  # names the environment variable
_SECONDS = 1800  # as long as torch waits by itself: the slowest process may load for a while
# What a launcher tells a process that is to join others.
_LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")

_telling: dict[Any, Any] = {}  # default group -> the group of the CPUs that tells errors


def count() -> int:
    """Return how many processes there are: of the group if one is joined, else as launched."""
    if _joined():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _launched() else 1


def rank() -> int:
    """Return this process's number, 0 if it is alone."""
    if _joined():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _launched() else 0


def local_rank() -> int:
    """Return this process's number among those of its machine, 0 if it is alone."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes, prints and tells of progress."""
    return rank() == 0


def timeout() -> timedelta:
    """Return how long to wait for another process: `ESFT_TIMEOUT` in seconds, or half an hour.

    Raises:
        EsftError: the variable is no positive number.
    """
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given) if given else float(_SECONDS)
        if not 0 < seconds < 1e9:
            raise ValueError
    except ValueError:
        raise EsftError(f"{TIMEOUT}={given}: must be a positive number of seconds") from None
    return timedelta(seconds=seconds)


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that this one was launched with, while the block runs.

    Does nothing where a group is joined already, or the process is alone.

    Raises:
        LostProcessError: the others do not come.
    """
    if _joined() or not _launched() or count() == 1:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    with _explained("start together"):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout())
    try:
        yield
    finally:
        _telling.clear()
        dist.destroy_process_group()


@contextmanager
def together(what: str) -> Iterator[None]:
    """End the block in all processes, or fail in all: an error in one of them ends the others.

    All of them must enter it. Blocks with collective calls inside may do so, too: a process that
    waits in such a call for one that failed learns of it by the timeout at the latest.

    Args:
        what: they do, for messages: "profile".

    Raises:
        ElsewhereError: only another process failed, or one with a lower number did as well.
        LostProcessError: another process is gone or does not answer.
    """
    if not _joined() or dist.get_world_size() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        gone = isinstance(error, LostProcessError | ElsewhereError)  # told by the process itself
        failed = gathered(None if gone else f"{error}", what)
        first = next((rank for rank, text in enumerate(failed) if text is not None), rank())
        if first < rank():
            raise ElsewhereError(_told(first, failed[first], what)) from error
        raise
    failed = gathered(None, what)
    for number, text in enumerate(failed):
        if text is not None:
            raise ElsewhereError(_told(number, text, what))


def gathered(value: Any, what: str) -> list[Any]:
    """Return the value of every process, by rank, in each of them.

    Args:
        value: anything that pickle can carry from process to process.
        what: they do, for messages.

    Raises:
        LostProcessError: another process is gone or does not answer.
    """
    if not _joined() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _explained(what):
        dist.all_gather_object(values, value, group=_cpu_group())
    return values


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _launched() -> bool:
    return all(name in os.environ for name in _LAUNCHED)


def _cpu_group() -> Any:
    """Return a group of all processes on the CPU, made when all first ask for it.

    Its timeout is ours, whoever joined the processes.
    """
    default = dist.group.WORLD
    if default not in _telling:
        _telling.clear()
        _telling[default] = dist.new_group(backend="gloo", timeout=timeout())
    return _telling[default]


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: the environment makes no sense
        raise LostProcessError(
            f"process {rank()} of {count()}: another process ended, or did not answer within "
            f"{timeout().total_seconds():,g} s ({TIMEOUT}), while they {what}; what it said itself "
            f"tells why"
        ) from error


def _told(number: int, text: Any, what: str) -> str:
    return f"process {number} of {count()} failed while they {what}: {text}"

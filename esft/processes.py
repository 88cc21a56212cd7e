"""The processes that a program was launched as, and what they tell each other.

`torchrun` and `accelerate launch` start the same program several times and number the processes in
their environment. Everything here also works in a process that is alone, and does nothing then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
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

    All of them must enter it. Inside, `gathered` and `summed` learn of another's error, too; a
    process that waits in any other collective call learns of it by the timeout at the latest.

    Args:
        what: they do, for messages: "profile".

    Raises:
        ElsewhereError: another process failed, and tells the user, as this one need not.
        LostProcessError: another process is gone or does not answer.
    """
    try:
        yield
        gathered(None, what)
    except (ElsewhereError, LostProcessError):
        raise
    except Exception as error:
        if not vars(error).get("esft_told"):  # a block inside this one has
            vars(error)["esft_told"] = True
            _heed(_exchanged(_Failure(str(error)), what), what, error)
        raise


@contextmanager
def as_one(what: str) -> Iterator[None]:
    """Join the processes that this one was launched with, if not yet done, and act together."""
    with joined(), together(what):
        yield


def gathered(value: Any, what: str) -> list[Any]:
    """Return the value of every process, by rank, in each of them.

    Args:
        value: anything that pickle can carry from process to process.
        what: they do, for messages.

    Raises:
        ElsewhereError, LostProcessError: see `together`.
    """
    values = _exchanged(value, what)
    _heed(values, what)
    return values


def summed(tensors: Sequence[Tensor], what: str) -> list[Tensor]:
    """Return the sums of tensors over the processes, on the CPU, in each of them.

    Args:
        tensors: of the same shapes and dtypes everywhere, on any device.
        what: they do, for messages.

    Raises:
        ElsewhereError, LostProcessError: see `together`.
    """
    gathered(None, what)
    found = [tensor.detach().cpu().clone() for tensor in tensors]
    if _several():
        with _explained(what):
            for tensor in found:
                dist.all_reduce(tensor, group=_cpu_group())
    return found


def sent_to_main(tensor: Tensor, what: str) -> list[Tensor] | None:
    """Return the tensor of every process, by rank, in the main process; None in the others.

    Args:
        tensor: of any shape, on any device, of the same dtype everywhere.
        what: they do, for messages.

    Returns:
        tensors on the CPU.

    Raises:
        ElsewhereError, LostProcessError: see `together`.
    """
    own = tensor.detach().cpu().contiguous()
    shapes = gathered(own.shape, what)
    if not is_main():
        if own.numel():
            with _explained(what):
                dist.send(own, 0, group=_cpu_group())
        return None
    found = [own]
    for sender, shape in enumerate(shapes[1:], start=1):
        found.append(torch.empty(shape, dtype=own.dtype))
        if shape.numel():
            with _explained(what):
                dist.recv(found[-1], sender, group=_cpu_group())
    return found


@dataclass(frozen=True)
class _Failure:
    """What a process sends instead of a value when it has failed."""

    message: str


def _exchanged(value: Any, what: str) -> list[Any]:
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _explained(what):
        dist.all_gather_object(values, value, group=_cpu_group())
    return values


def _heed(values: Sequence[Any], what: str, own: Exception | None = None) -> None:
    """Raise ElsewhereError if another process failed; the first to fail by rank is who tells."""
    for number, value in enumerate(values):
        if isinstance(value, _Failure):
            if number != rank():
                message = f"process {number} of {count()} failed while they {what}: {value.message}"
                raise ElsewhereError(message) from own
            return


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _several() -> bool:
    return _joined() and dist.get_world_size() > 1


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

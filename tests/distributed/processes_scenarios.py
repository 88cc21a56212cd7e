"""What processes tell each other; in the last scenario one of them does not answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esft.errors import EsftError
from esft.processes import as_one, count, gathered, is_main, rank, sent_to_main, summed, together


def who(folder: Path) -> Any:
    with as_one("count"):  # joined already: the group stays
        pass
    return [rank(), count(), is_main(), dist.is_initialized()]


def exchanged(folder: Path) -> Any:
    own = rank()
    sums = summed([torch.tensor([own + 1, 5]), torch.ones(own * 0, 3)], "add")
    tensors = sent_to_main(torch.full((own * 2, 3), own + 0.5, dtype=torch.bfloat16), "send")
    return {
        "gathered": gathered({"rank": own}, "gather"),
        "summed": [total.tolist() for total in sums],
        "sent": tensors and [tensor.tolist() for tensor in tensors],
    }


def error_in_one(folder: Path) -> Any:
    return _said(lambda: _raise(ValueError("no such number")), only=1)


def error_in_both(folder: Path) -> Any:
    return _said(lambda: _raise(ValueError(f"of {rank()}")), only=None)


def error_before_an_exchange(folder: Path) -> Any:
    """The other process is in `summed` then, not at the block's end."""
    if rank() == 0:
        return _said(lambda: _raise(ValueError("too early")), only=0)
    return _said(lambda: summed([torch.ones(2)], "add"), only=1)


def error_in_an_inner_block(folder: Path) -> Any:
    """It is told once: what follows is still in step."""
    said = _said(_inner, only=None)
    return [said, gathered(rank(), "go on")]


def no_answer(folder: Path) -> Any:
    started = time.monotonic()
    said = _said(lambda: time.sleep(16), only=1)
    return [said, time.monotonic() - started]


def _inner() -> None:
    with together("look closer"):
        if rank() == 1:
            raise ValueError("deep inside")


def _said(action: Any, only: int | None) -> list[str]:
    try:
        with together("try"):
            if only in (None, rank()):
                action()
    except (EsftError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return []


def _raise(error: Exception) -> None:
    raise error

"""Profiles that two processes share out; the last scenario ends one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esft.data.example import Example
from esft.errors import EsftError, ModelError
from esft.profiling import profile_model
from tests.models import tiny


def several_batches(folder: Path) -> Any:
    return _both("qwen3_moe", batch_tokens=48)


def more_batches_than_parts(folder: Path) -> Any:
    return _both("glm4_moe", batch_tokens=1)  # a row each


def fewer_batches_than_processes(folder: Path) -> Any:
    return _both("qwen3_moe", batch_tokens=100_000)


def only_answers(folder: Path) -> Any:
    return _both("qwen3_moe", batch_tokens=48, count="completion")


def one_fails(folder: Path) -> Any:
    return _ended(lambda: _fail(ModelError("layer 3 is upside down")), only=1)


def one_has_a_bug(folder: Path) -> Any:
    return _ended(lambda: _fail(ZeroDivisionError("nought")), only=0)


def both_fail(folder: Path) -> Any:
    return _ended(lambda: _fail(ModelError("nothing here")), only=None)


def one_is_killed(folder: Path) -> Any:
    return _ended(lambda: os.kill(os.getpid(), signal.SIGKILL), only=1)


def _both(family: str, **options: Any) -> list[dict[str, Any]]:
    """Profile with all batches in each process, then with those shared out."""
    model, rows = tiny(family), _rows()
    runs = [
        profile_model(model, rows, cooccurrence=True, split=split, **options)
        for split in (False, True)
    ]
    return [scores.to_dict() for scores in runs]


def _ended(action: Any, only: int | None) -> list[str]:
    """Profile with something in the way at the second batch, and say how that ended."""
    model, calls = tiny("qwen3_moe"), []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2 and only in (None, dist.get_rank()):
            action()

    model.model.register_forward_pre_hook(hook)
    try:
        profile_model(model, _rows(), batch_tokens=48, split=True)
    except (EsftError, ArithmeticError) as error:
        return [type(error).__name__, str(error)]
    return []


def _fail(error: Exception) -> None:
    raise error


def _rows() -> Sequence[Example]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 20, (40,), generator=generator).tolist()
    rows = [torch.randint(3, 20, (length,), generator=generator).tolist() for length in lengths]
    return [Example(row, [place > 2 for place in range(len(row))], "") for row in rows]

"""Deterministic mode: the same bits from the same run on the same machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esft.errors import EsftError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """Let torch use only operations that give the same bits each time, inside the block.

    What the seeds do not settle: algorithms that add in an order that changes from run to run, or
    that are chosen by timing them. How many threads add up is the caller's to keep the same. What
    was set before is set again afterwards.

    Args:
        enabled: if not, nothing is done.

    Raises:
        EsftError: something has no such operation; names it.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    timed = torch.backends.cudnn.benchmark
    workspace = os.environ.get(_WORKSPACE)
    # cuBLAS reads it when it is first used; in a process that has used it, it must be set already.
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise EsftError(f"deterministic: true cannot be kept: {reason}") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        torch.backends.cudnn.benchmark = timed
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)

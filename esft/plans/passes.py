"""Forward passes without gradients, as commands and runs take them, on a model without content."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esft.plans.pretence import Tracker

_AT_ONCE = 1024  # rows of logits that `esft.evaluation` turns into float32 at a time


def peak(tracker: Tracker, run: Callable[[], object]) -> int:
    """Return the most memory while something runs."""
    tracker.reset()
    with torch.no_grad():
        run()
    return tracker.peak


def read(model: Any, rows: int, length: int) -> None:
    """Read as `esft.profiling` has a model read: without logits."""
    model.base_model(input_ids=_ids(rows, length), attention_mask=None, use_cache=False)


def score(model: Any, rows: int, length: int, kept: int) -> None:
    """Read as `esft.evaluation` has a model read.

    Args:
        model: to read.
        rows: B.
        length: S.
        kept: places of the S that logits are computed for.
    """
    ids = _ids(rows, length)
    keep = torch.ones(kept, dtype=torch.int64)
    logits = model(input_ids=ids, attention_mask=ids, use_cache=False, logits_to_keep=keep).logits[
        :, :kept
    ]
    rows_of_logits = logits.flatten(0, 1)[:_AT_ONCE].clone().float()
    (rows_of_logits - rows_of_logits.amax(dim=1, keepdim=True)).exp_()  # which logsumexp makes


def ask(model: Any, rows: int, length: int) -> Any:
    """Read prompts and go on with each by one token.

    Args:
        model: to ask.
        rows: B.
        length: tokens of a prompt and its answer.

    Returns:
        the keys and values of all, or what the family keeps in their place.
    """
    prompt = _ids(rows, length - 1)
    past = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    return model(input_ids=_ids(rows, 1), past_key_values=past, use_cache=True).past_key_values


def _ids(rows: int, length: int) -> Tensor:
    return torch.ones((rows, length), dtype=torch.int64)

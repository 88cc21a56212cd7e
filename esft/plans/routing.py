"""The one thing that experts read from tensors: how many rows go to those that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from esft_kernels import grouped, layer
from esft_kernels.bank import ExpertBank
from esft_kernels.segments import Segment, Segments
from torch import Tensor


@contextmanager
def routed(share: float) -> Iterator[None]:
    """Let `moe_mlp` take tensors without content, on its PyTorch path.

    Args:
        share: of the rows of a layer where experts train, how many go to these.
    """

    def cut(topk_index: Tensor, bank: ExpertBank) -> Segments:
        # As `segments.cut`, with the numbers given that it would wait for.
        N, n = topk_index.numel(), bank.num_selected
        rest = bank.num_slots - n
        middle = (round(N * share) if rest else N) if n else 0
        order, token = (topk_index.new_empty(N, dtype=torch.int64) for _ in range(2))
        offsets = topk_index.new_empty(bank.num_slots, dtype=torch.int32)
        return Segments(
            Segment(order[:middle], token[:middle], offsets[:n]),
            Segment(order[middle:], token[middle:], offsets[n:]),
            topk_index.new_empty(topk_index.shape, dtype=torch.int64),
            complete=True,
        )

    kernels: Any = (grouped, "cut", cut), (layer, "check", lambda *_: None)
    usual = [(module, name, getattr(module, name)) for module, name, _ in kernels]
    try:
        for module, name, function in kernels:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in usual:
            setattr(module, name, function)

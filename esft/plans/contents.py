"""What a run reads from tensors: how many rows go to experts that train, where numbers lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from esft_kernels import grouped, layer
from esft_kernels.bank import ExpertBank
from esft_kernels.segments import Segment, Segments
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from esft import low_rank


@contextmanager
def known(share: float) -> Iterator[None]:
    """Answer, inside the block, what `moe_mlp` and low-rank factors ask for the contents of.

    Args:
        share: of the rows of a layer where experts train, how many go to these.
    """
    with _routed(share), _places_computed():
        yield


@contextmanager
def _places_computed() -> Iterator[None]:
    # Which numbers of a stack are whose on disk: small tensors, which are made and read for real.
    names = ("layer_parts", "_spot")
    usual = {name: getattr(low_rank, name) for name in names}

    def for_real(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with _disable_current_modes():
                return function(*args)

        return run

    try:
        for name, function in usual.items():
            setattr(low_rank, name, for_real(function))
        yield
    finally:
        for name, function in usual.items():
            setattr(low_rank, name, function)


@contextmanager
def _routed(share: float) -> Iterator[None]:
    """Let `moe_mlp` take tensors without content, on its PyTorch path."""

    def cut(topk_index: Tensor, bank: ExpertBank) -> Segments:
        # As `segments.cut`, with the numbers given that it would wait for.
        N, n = topk_index.numel(), bank.num_selected
        rest = bank.num_slots - n
        middle = (round(N * share) if rest else N) if n else 0
        order, token = (topk_index.new_empty(N, dtype=torch.int64) for _ in range(2))
        offsets = topk_index.new_empty(bank.num_slots, dtype=torch.int32)
        # Where the host asks, each expert of a bank has as many rows as another.
        own, others = (
            [m * i // c for i in range(1, c + 1)] for m, c in ((middle, n), (N - middle, rest))
        )
        return Segments(
            Segment(order[:middle], token[:middle], offsets[:n], own),
            Segment(order[middle:], token[middle:], offsets[n:], others),
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

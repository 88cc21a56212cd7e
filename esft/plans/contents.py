"""What a run reads from tensors, given instead: how many rows go to which experts, and so on.

The kernels and the factors of low rank ask for numbers where they need them, and know nothing of
plans; inside `known` their functions that ask are replaced by ones that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from esft_kernels import chunks, grouped, layer
from esft_kernels.bank import ExpertBank, StoredMatrices
from esft_kernels.grouped_mm import grouped_linear
from esft_kernels.quantised import Quantised, decoding
from esft_kernels.segments import Segment, Segments
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from esft import low_rank

_PLANNED = "cpu"  # what tensors without content say that they are on


@contextmanager
def known(share: float, device: str = "cpu") -> Iterator[None]:
    """Answer, inside the block, what `moe_mlp` and low-rank factors ask for the contents of.

    `moe_mlp` takes its PyTorch path.

    Args:
        share: of the rows of a layer where experts train, how many go to these.
        device: that is planned for: `cpu` or `cuda`.
    """
    scratch = chunks.SCRATCH_BYTES.get(device, chunks.LARGE_SCRATCH_BYTES)
    piece = decoding.PIECE.get(device, decoding.LARGE_PIECE)
    replaced: list[tuple[Any, str, Any]] = [
        (grouped, "cut", _Cut(share)),
        (grouped, "stored_linear", _stored_linear),
        (layer, "check", lambda *_: None),
        (chunks, "SCRATCH_BYTES", {_PLANNED: scratch}),
        (decoding, "PIECE", {_PLANNED: piece}),
        (Quantised, "dequantise", _dequantise),
        # Which numbers of a stack are whose on disk: small tensors, made and read for real.
        (low_rank, "layer_parts", _for_real(low_rank.layer_parts)),
        (low_rank, "_spot", _for_real(low_rank._spot)),
    ]
    if device != _PLANNED:
        attention = _fused(F.scaled_dot_product_attention)
        replaced.append((F, "scaled_dot_product_attention", attention))
    usual = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    try:
        for place, name, value in replaced:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in usual:
            setattr(place, name, value)


class _Cut:
    """`esft_kernels.segments.cut`, with the numbers given that it would wait for."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, topk_index: Tensor, bank: ExpertBank) -> Segments:
        N, n = topk_index.numel(), bank.num_selected
        rest = bank.num_slots - n
        middle = (round(N * self.share) if rest else N) if n else 0
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


def _stored_linear(x: Tensor, matrices: StoredMatrices, segment: Segment) -> Tensor:
    """`esft_kernels.chunks.stored_linear`: the first chunk as it is, the others' rows with it."""
    stored, groups = matrices.stored, matrices.stored.shape[0]
    together = min(groups, chunks.experts_at_once(stored))
    rows = segment.ends[together - 1] if groups else 0
    dense = stored[:together].dequantise()
    # Of the last chunk, before it is copied to where it belongs: the result, and the chunk's part.
    y = grouped_linear(x, matrices.orient(dense[:1].expand(groups, -1, -1)), segment.offsets)
    y.new_empty(rows, y.shape[1])
    return y


def _dequantise(
    self: Quantised, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Tensor:
    """`Quantised.dequantise`, of the many pieces that are computed alike the first."""
    if out is None:
        out = torch.empty(self.shape, dtype=dtype or self.dtype)
    rows = slice(0, max(1, decoding.PIECE[_PLANNED] // self.columns))
    codes, scale, offset = (
        None if tensor is None else tensor.reshape(-1, tensor.shape[-1])[rows]
        for tensor in (self.codes, self.scale, self.offset)
    )
    assert codes is not None
    assert scale is not None
    decoding.decode(codes, scale, offset, self.form, self.block, out.view(-1, self.columns)[rows])
    return out


def _fused(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let attention whose values are narrower than its keys (MLA) be fused, as it is on a GPU.

    A CPU's kernel takes both alike only, and where they differ all scores are computed at a time.
    """

    def run(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        width = value.shape[-1]
        if (missing := query.shape[-1] - width) > 0:
            value = F.pad(value, (0, missing))
        return attention(query, key, value, *args, **options)[..., :width]

    return run


def _for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run

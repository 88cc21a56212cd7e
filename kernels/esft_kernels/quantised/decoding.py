"""From codes to weights in PyTorch: bytes are looked up whole, in pieces that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.quantised.kinds import KINDS, Kind
from esft_kernels.quantised.packing import codes_of_bytes, look_up, unpack

PIECE = {"cpu": 2**18}
LARGE_PIECE = 2**26
"""Weights of a piece: what a core's cache holds, or enough to keep another device busy."""


def decode(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    kind: Kind,
    block: int,
    out: Tensor,
) -> None:
    """Write `scale * value(code) + offset`, computed in fp32 and rounded once.

    Args:
        codes: `[rows, bytes]`.
        scale: `[rows, B]` bf16.
        offset: `[rows, B]` bf16, or None.
        kind: of the codes.
        block: columns of a block.
        out: `[rows, C]`, contiguous.
    """
    rows, columns = out.shape
    step = max(1, PIECE.get(out.device.type, LARGE_PIECE) // columns)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        values = _values(codes[piece], kind)[:, :columns]
        shifts = None if offset is None else offset[piece]
        for part, blocks in _blocks(columns, block):
            weights = values[:, part].unflatten(1, (-1, min(block, part.stop - part.start)))
            weights.mul_(scale[piece, blocks, None].float())
            if shifts is not None:
                # The product, of at most 12 digits, was exact: a fused sum gives the same.
                weights.add_(shifts[:, blocks, None].float())
        out[piece] = values


def _blocks(columns: int, block: int) -> list[tuple[slice, slice]]:
    """Return the columns that are whole blocks, then those of a shorter one, with their scales."""
    whole = columns // block
    parts = [
        (slice(0, whole * block), slice(0, whole)),
        (slice(whole * block, columns), slice(whole, whole + 1)),
    ]
    return [part for part in parts if part[0].start < part[0].stop]


def _values(codes: Tensor, kind: Kind) -> Tensor:
    """Return what codes stand for: `[rows, C or more]` fp32, contiguous."""
    if kind.bits != 4:
        return unpack(codes, kind).float()
    return look_up(_PAIRS[kind.name], codes).view(torch.float32)


def _pairs(kind: Kind) -> Tensor:
    """Return both values of each byte's two codes, as one number of 64 bits: `[256]`."""
    book = kind.codebook or range(16)
    values = [[book[code] for code in codes] for codes in codes_of_bytes(4).tolist()]
    return torch.tensor(values, dtype=torch.float32).view(torch.int64)[:, 0]


_PAIRS = {kind.name: _pairs(kind) for kind in KINDS.values() if kind.bits == 4}

"""Tensors of safetensors files as torch's. Apart, because what only moves bytes needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esft.shards import Entry, read_blocks, read_rows

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_BLOCK = 1 << 22  # bytes of a tensor at a time


def read_tensor(entry: Entry, rows: Sequence[int] | None = None) -> Tensor:
    """Read one tensor of a delta's `entries`, or of any checkpoint in a dtype of `TORCH`.

    Args:
        entry: its place.
        rows: read only these, in their order; None reads all.
    """
    blocks = read_blocks(entry) if rows is None else read_rows(entry, rows)
    values = bytearray().join(blocks)
    shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
    if not values:
        return torch.empty(shape, dtype=TORCH[entry.dtype])
    return torch.frombuffer(values, dtype=TORCH[entry.dtype]).reshape(shape)


def tensor_blocks(value: Tensor) -> Iterator[bytes]:
    """Yield the bytes of a contiguous tensor on the CPU, 4 MiB at a time."""
    flat = value.reshape(-1).view(torch.uint8)
    for block in flat.split(_BLOCK):
        yield block.numpy().tobytes()


def mean_bytes(blocks: list[bytes], dtype: str) -> bytes:
    """Return the mean of numbers that are given as bytes, rounded once.

    Args:
        blocks: as many bytes each.
        dtype: safetensors' name of the numbers' dtype.
    """
    values = [torch.frombuffer(bytearray(block), dtype=TORCH[dtype]) for block in blocks]
    mean = torch.stack(values).double().mean(0).to(TORCH[dtype])
    return mean.view(torch.uint8).numpy().tobytes()

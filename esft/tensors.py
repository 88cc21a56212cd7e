"""Tensors of safetensors files as torch's. Apart, because what only moves bytes needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from esft.errors import ModelError
from esft.shards import Entry, read_blocks, read_rows

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
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


def read_numbers(entry: Entry, start: int = 0, end: int | None = None) -> Tensor:
    """Read a tensor's numbers, or those from `start` to `end`, into one buffer: `[end - start]`.

    Any dtype of numbers will do, integers too.

    Raises:
        ModelError: the file is missing, or ends within the tensor.
    """
    dtype = TORCH.get(entry.dtype) or _INTEGERS.get(entry.dtype)
    if dtype is None:
        raise ModelError(f"{entry.file}: a tensor is stored as {entry.dtype}, quantised")
    width = dtype.itemsize
    last = (entry.end - entry.start) // width if end is None else end
    numbers = torch.empty(last - start, dtype=dtype)
    room = memoryview(numbers.view(torch.uint8).numpy().data) if len(numbers) else memoryview(b"")
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start + start * width)
            while len(room):
                if not (got := file.readinto(room)):
                    raise ModelError(f"{entry.file}: ends in the middle of a tensor")
                room = room[got:]
    except FileNotFoundError:
        raise ModelError(f"{entry.file}: this weights file is missing") from None
    except OSError as error:
        raise ModelError(f"{entry.file}: cannot be read: {error}") from error
    return numbers


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

"""Safetensors files written tensor by tensor, one after another, from blocks of bytes.

The library's own writer wants every tensor in memory at once, and their sizes beforehand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from esft.dtypes import FLOATS, width
from esft.files import explain_write_errors, write_json

SHARD_SIZE = 5_000_000_000  # bytes of tensors in a file


@dataclass(frozen=True)
class Source:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        dtype: safetensors' name of the dtype.
        shape: its shape; None for a string of bytes whose length shows when it is written,
            which becomes a tensor `[length]`.
        size: its bytes; where `shape` is None, about that.
        blocks: called once, returns its bytes in pieces.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    size: int
    blocks: Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Written:
    """What was written of a tensor: number of bytes and their hex sha256."""

    bytes: int
    sha256: str


def write_shards(
    folder: Path, stem: str, tensors: Sequence[Source], *, limit: int = SHARD_SIZE
) -> dict[str, Written]:
    """Write tensors as `stem.safetensors`, or as several files with an index.

    Args:
        folder: an existing folder, made with `files.new_folder`, so that it appears complete.
        stem: what the files' names begin with.
        tensors: in any order; wide dtypes go first, so that every number is aligned, then names
            decide, as in the library.
        limit: bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
        What was written, by name.

    Raises:
        OutputError: the disk is full or read-only.
    """
    ordered = sorted(tensors, key=lambda source: (-_width(source.dtype), source.name))
    groups = _groups(ordered, limit)
    if len(groups) == 1:
        return _write_file(folder / f"{stem}.safetensors", groups[0])
    written: dict[str, Written] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        written |= _write_file(folder / name, group)
        weight_map |= {source.name: name for source in group}
    total = sum(item.bytes for item in written.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return written


def _groups(tensors: Sequence[Source], limit: int) -> list[list[Source]]:
    groups: list[list[Source]] = [[]]
    left = limit
    for source in tensors:
        if source.size > left and groups[-1]:
            groups.append([])
            left = limit
        groups[-1].append(source)
        left -= source.size
    return groups


def _width(dtype: str) -> int:
    return width(dtype) if dtype in FLOATS else 1


def _write_file(path: Path, tensors: Sequence[Source]) -> dict[str, Written]:
    written: dict[str, Written] = {}
    # Room for the header is left and filled at the end, when all lengths are known. Lengths that
    # are not known yet count as ones of more digits than they can have.
    guess = {source.name: Written(10 * source.size + 10**6, "") for source in tensors}
    room = len(_header(tensors, guess))
    room += -(8 + room) % 8
    with (
        explain_write_errors(path, needed=sum(source.size for source in tensors)),
        open(path, "wb") as file,
    ):
        file.write(struct.pack("<Q", room) + b" " * room)
        for source in tensors:
            digest, count = sha256(), 0
            for block in source.blocks():
                file.write(block)
                digest.update(block)
                count += len(block)
            written[source.name] = Written(count, digest.hexdigest())
        file.seek(8)
        file.write(_header(tensors, written))
    return written


def _header(tensors: Sequence[Source], written: dict[str, Written]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for source in tensors:
        end = start + written[source.name].bytes
        shape = [end - start] if source.shape is None else list(source.shape)
        header[source.name] = {
            "dtype": source.dtype,
            "shape": shape,
            "data_offsets": [start, end],
        }
        start = end
    return json.dumps(header, separators=(",", ":")).encode()

"""Lossless coding of a delta's values against the base's: small to carry, decoded bit for bit.

Training moves most weights by a few units in the last place, or not at all. So the two bit
patterns are subtracted as whole numbers, the sign is folded into the lowest bit, the bytes of
equal weight are put together (the upper ones are nearly all zero then), and zstd codes the rest.
docs/delta.md has it as a formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, cast

import numpy as np
import zstandard

CODING = "zstd-difference/1"
BLOCK = 1 << 22  # bytes of values that are transposed together
_LEVEL = 12
_WINDOW = 1 << 23  # bytes that a decoder keeps, at most: a forged file may ask for gigabytes


def encode(values: Iterable[bytes], base: Iterable[bytes], width: int) -> Iterator[bytes]:
    """Yield the coded form of a tensor's bytes.

    Args:
        values: the tensor's bytes, in pieces.
        base: as many bytes of the base, in pieces, perhaps others.
        width: bytes of a number: 2, 4 or 8.
    """
    coder = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
    for new, old in zip(_blocks(values), _blocks(base), strict=True):
        difference = _numbers(new, width) - _numbers(old, width)
        folded = (difference << 1) ^ _sign(difference)
        yield coder.compress(folded.view(np.uint8).reshape(-1, width).T.tobytes())
    yield coder.flush()


def decode(
    coded: Iterable[bytes], base: Iterable[bytes], width: int, *, backwards: bool = False
) -> Iterator[bytes]:
    """Yield the bytes that `encode` was given.

    Args:
        coded: what `encode` gave, in pieces.
        base: the same bytes of the base as then; they say how many bytes there are.
        width: bytes of a number.
        backwards: `base` is what `encode` was given as values, and the base's bytes are wanted.

    Raises:
        ValueError: it is not what `encode` gave for as many bytes.
    """
    decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        reader = decoder.stream_reader(cast("IO[bytes]", _Pieces(coded)), read_across_frames=True)
        for old in _blocks(base):
            planes = np.frombuffer(_read(reader, len(old)), np.uint8)
            folded = np.ascontiguousarray(planes.reshape(width, -1).T).view(f"<u{width}")[:, 0]
            difference = (folded >> 1) ^ (0 - (folded & 1))
            known = _numbers(old, width)
            yield (known - difference if backwards else known + difference).tobytes()
        if reader.read(1):
            raise ValueError("more values are coded than the tensor has")
    except zstandard.ZstdError as error:
        raise ValueError(f"cannot decode its values: {error}") from None


class _Pieces:
    """What zstandard reads from."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    def read(self, _: int) -> bytes:
        return next(self._pieces, b"")


def _read(reader: zstandard.ZstdDecompressionReader, size: int) -> bytes:
    parts = []
    while size:
        part = reader.read(size)
        if not part:
            raise ValueError("fewer values are coded than the tensor has")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _numbers(values: bytes, width: int) -> np.ndarray:
    return np.frombuffer(values, f"<u{width}")


def _sign(difference: np.ndarray) -> np.ndarray:
    """Return all ones where the difference is negative, else 0."""
    return 0 - (difference >> (8 * difference.itemsize - 1))


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Cut bytes that come in any pieces into blocks of `BLOCK`; the last may be shorter."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) >= BLOCK:
            yield bytes(held[:BLOCK])
            del held[:BLOCK]
    if held:
        yield bytes(held)

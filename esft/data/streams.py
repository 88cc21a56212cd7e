"""Bytes of a data file, decompressed where its name says so, and its lines."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from esft.errors import DataError

COMPRESSED = (".gz", ".zst")
LONGEST_LINE = 64 << 20  # bytes; some 16 million tokens, which no model reads

# Bytes read at a time: zstd may make 30,000 times as many of them.
_COMPRESSED_CHUNK = 1 << 12


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a data file to read its bytes, decompressed if its name ends in .gz or .zst.

    Errors of the block that come from reading are told as of the file.

    Raises:
        DataError: the file is missing or cannot be read, or its compressed data is damaged.
    """
    try:
        with _open(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (EOFError, zlib.error, zstandard.ZstdError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed data is damaged or cut off: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read this data file: {error.strerror or error}") from None


def lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number, from 1; None for one that is longer than `LONGEST_LINE`.

    Lines end at line feeds only. What a line is too long by is read and dropped, so that memory
    stays bounded whatever the file is.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) <= LONGEST_LINE:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield number, None


def decoded(line: bytes | None, where: str) -> str:
    """Return a line as text.

    Raises:
        DataError: it is too long, has a NUL byte, or is not UTF-8.
    """
    if line is None:
        raise DataError(
            f"{where}: a line of more than {LONGEST_LINE >> 20} MiB; is this a text file with a "
            f"row a line?"
        )
    if b"\0" in line:
        raise DataError(
            f"{where}: a NUL byte; expected UTF-8 text (is the file UTF-16, or damaged?)"
        )
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}; "
            f"save the file as UTF-8"
        ) from None


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path), 1 << 17)
    return path.open("rb")


class _Zstd(io.RawIOBase):
    """Decompresses a file of zstd frames; zstandard's own reader does not mind one cut off."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # a frame has begun and not ended
        self._rest = b""  # read, but behind the end of a frame
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(_COMPRESSED_CHUNK)
            if not data:
                if self._inside:
                    raise EOFError("it ends inside a frame")
                return 0
            self._ready = memoryview(self._frame.decompress(data))
            self._inside, self._rest = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()

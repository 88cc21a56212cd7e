"""A file of storages: what batches hold between two layers, written once and mapped into memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, UntypedStorage

from esft.errors import OutputError

_ALIGN = mmap.ALLOCATIONGRANULARITY


class StateFile:
    """Storages one after another, each from a border of pages on.

    Attributes:
        path: the file.
        size: bytes up to where the next storage goes.
        written: bytes up to the end of the last.
    """

    def __init__(self, path: Path, what: str) -> None:
        """Make the file.

        Args:
            path: where; a file that is there is replaced.
            what: is kept in it, for messages: "the hidden states after model.layers.3".

        Raises:
            OutputError: it cannot be written.
        """
        self.path, self._what = path, what
        self.size = self.written = 0
        try:
            # Unbuffered: storages are large, and a write that fails is told at once.
            self._file = open(path, "w+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error, 0) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, storage: UntypedStorage) -> int:
        """Write a storage of any device and return the place of its first byte.

        Raises:
            OutputError: the disk is full or fails.
        """
        place = self.size
        values = memoryview(_bytes(storage).cpu().numpy().data)
        done = 0
        try:
            self._file.seek(place)
            while done < len(values):
                done += self._file.write(values[done:])
        except OSError as error:
            raise self._refused(error, len(values)) from error
        if values:
            self.written = place + len(values)
        self.size = -(-self.written // _ALIGN) * _ALIGN
        return place

    def map(self, place: int, size: int) -> UntypedStorage:
        """Return a storage that lies in the file: read as it is used, and never written back.

        It stays valid when the file is closed, and where the system allows it when it is deleted.
        """
        return map_storage(self._file.fileno(), place, size)

    def sync(self) -> None:
        """Wait until all of it is on disk.

        Raises:
            OutputError: the disk is full or fails.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error, 0) from error

    def close(self) -> None:
        """Close the file; what was mapped stays."""
        self._file.close()

    def _refused(self, error: OSError, needed: int) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(
                f"{self.path}: no space left on the disk for {self._what}: {self.written:,} bytes "
                f"are written, {needed:,} more were to follow"
            )
        return OutputError(f"{self.path}: cannot write {self._what}: {error.strerror or error}")


def map_storage(file: int, place: int, size: int) -> UntypedStorage:
    """Map a part of an open file, see `StateFile.map`.

    Args:
        file: its descriptor.
        place: of the first byte, a multiple of the system's granularity.
        size: in bytes, at least 1.
    """
    # A copy of a page is made when something writes to it, as models do that work in place.
    mapped = mmap.mmap(file, size, access=mmap.ACCESS_COPY, offset=place)
    return torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

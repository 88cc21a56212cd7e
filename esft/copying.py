"""Copy a checkpoint's files, with the file system's own means where it has them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from esft.files import explain_write_errors

_PIECE = 1 << 26  # bytes that the system copies at a time
# What the call says where it is not offered, rather than where the disk is at fault.
_CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def copy_file(source: Path, target: Path, told: Callable[[int], None] | None = None) -> None:
    """Copy a file's bytes; where the file system can share them, no byte is moved.

    Args:
        source: an existing file.
        target: a new one.
        told: called with the number of bytes after each piece.

    Raises:
        OutputError: the disk is full or read-only.
    """
    size = source.stat().st_size
    with (
        explain_write_errors(target, needed=size),
        open(source, "rb") as old,
        open(target, "wb") as new,
    ):
        left = size
        while left:
            copied = _copy_piece(old.fileno(), new.fileno(), min(left, _PIECE))
            if copied is None:
                # The system cannot, as across some file systems: by hand, from where it stopped.
                position = size - left
                old.seek(position)
                new.seek(position)
                shutil.copyfileobj(old, new, _PIECE)
                copied = left
            left -= copied
            if told is not None:
                told(copied)


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy configuration and tokenizer; no weights, above all no pickled ones.

    Raises:
        OutputError: the disk is full or read-only.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS_SUFFIXES:
            copy_file(path, folder / path.name)


def _copy_piece(source: int, target: int, size: int) -> int | None:
    """Let the system copy some bytes from one open file to another; None where it cannot."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source, target, size) or None
    except OSError as error:
        if error.errno in _CANNOT:
            return None
        raise

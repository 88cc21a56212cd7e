"""Memory that a process frees and soon needs again."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of giving them back to the system.

    By default glibc maps each block above 32 MB anew, and the kernel clears it page by page:
    a training step on a CPU that allocates the same large tensors again and again spent a third
    of its time on that. Does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        mallopt(parameter, _MOST)

"""Freed memory is kept: the kernel is not asked for the same large block again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Counts the pages that the kernel hands out while one block of 64 MB is made five times.
SCRIPT = """
import resource, sys
from esft_cli.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
bytearray(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    bytearray(b"x") * (64 << 20)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


def handed_out(how: str) -> int:
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_a_large_block_is_used_again():
    once = 64 << 20
    assert handed_out("give back") >= 5 * once
    assert handed_out("keep") <= 2 * once

"""Lossless coding of differences: any bits in, the same bits out, for every width."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esft.compression import BLOCK, decode, encode

GENERATOR = np.random.default_rng(0)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def round_trip(values: bytes, base: bytes, width: int, size: int = 1 << 20) -> bytes:
    coded = b"".join(encode(pieces(values, size), pieces(base, size + 2), width))
    return b"".join(decode(pieces(coded, 100), pieces(base, size + 6), width))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.data(), st.sampled_from([2, 4, 8]), st.integers(0, 40))
def test_any_bits_come_back(data: st.DataObject, width: int, count: int) -> None:
    size = count * width
    values, base = (data.draw(st.binary(min_size=size, max_size=size)) for _ in "ab")
    assert round_trip(values, base, width, size=width * 3) == values


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("count", [BLOCK // 8 - 1, BLOCK // 8, 3 * BLOCK // 8 + 5])
def test_several_blocks(width: int, count: int) -> None:
    base, values = (GENERATOR.integers(0, 256, count * width, np.uint8).tobytes() for _ in "ab")
    assert round_trip(values, base, width, size=1_000_003) == values


def test_values_a_few_units_from_the_base_are_small() -> None:
    base = GENERATOR.integers(0, 2**16, 1 << 20, np.uint16)
    moved = base + GENERATOR.integers(-1, 2, base.size).astype(np.uint16)
    coded = b"".join(encode([moved.tobytes()], [base.tobytes()], 2))
    # Three values of equal chance: log2(3) = 1.58 bits; at 16 bits stored, 10 %.
    assert len(coded) < 0.13 * moved.nbytes
    same = b"".join(encode([base.tobytes()], [base.tobytes()], 2))
    assert len(same) < 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda coded: coded[: len(coded) // 2], "fewer values are coded"),
        (lambda coded: b"", "fewer values are coded"),
        (lambda coded: b"\x00" + coded[1:], "cannot decode"),
    ],
)
def test_what_was_not_coded_so_is_refused(damage, message: str) -> None:
    values = GENERATOR.integers(0, 256, 4000, np.uint8).tobytes()
    coded = b"".join(encode([values], [bytes(4000)], 2))
    with pytest.raises(ValueError, match=message):
        list(decode([damage(coded)], [bytes(4000)], 2))
    with pytest.raises(ValueError, match="more values are coded"):
        list(decode([coded], [bytes(3000)], 2))


def test_memory_stays_small_whatever_the_size() -> None:
    """300 MB of values in a process of its own, coded and decoded piece by piece."""
    code = """
import json, resource
from esft.compression import decode, encode
def zeros():
    for _ in range(300): yield bytes(1 << 20)
list(decode(encode([bytes(1 << 22)], [bytes(1 << 22)], 2), [bytes(1 << 22)], 2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(map(len, decode(encode(zeros(), zeros(), 2), zeros(), 2)))
print(json.dumps([size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown = json.loads(done.stdout)
    assert size == 300 << 20
    assert grown < 64 << 10  # kilobytes

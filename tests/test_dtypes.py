"""Which bit patterns are finite: torch's own word for it, for every pattern there is."""

from __future__ import annotations

import pytest
import torch

from esft.dtypes import FLOATS, is_finite, width
from esft.tensors import TORCH


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_pattern_of_two_bytes(dtype: str) -> None:
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(TORCH[dtype])
    raw = patterns.numpy().tobytes()
    found = [is_finite(raw[2 * n : 2 * n + 2], dtype) for n in range(2**16)]
    assert found == torch.isfinite(numbers).tolist()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_the_edges_of_wider_numbers(dtype: str) -> None:
    edge = torch.finfo(TORCH[dtype])
    for value in (0.0, -0.0, edge.max, edge.min, edge.tiny, edge.smallest_normal / 2, 1.5):
        number = torch.tensor([1.0, value], dtype=TORCH[dtype])
        assert is_finite(number.numpy().tobytes(), dtype)
    for value in (float("nan"), float("inf"), float("-inf")):
        number = torch.tensor([1.0, value, 1.0], dtype=TORCH[dtype])
        assert not is_finite(number.numpy().tobytes(), dtype)
    assert is_finite(b"", dtype)


def test_widths() -> None:
    assert {name: width(name) for name in FLOATS} == {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

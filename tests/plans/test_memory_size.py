"""An amount of memory as a user writes it."""

from __future__ import annotations

import pytest

from esft.errors import EsftError
from esft.plans.memory_size import memory_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 10**9),
        ("80 GB", 80 * 10**9),
        ("24GiB", 24 * 2**30),
        ("1.5gb", 1_500_000_000),
        ("16000MB", 16 * 10**9),
        ("512", 512),
        (512, 512),
        ("2T", 2 * 10**12),
    ],
)
def test_amounts(text: str | int, size: int) -> None:
    assert memory_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "much", "GB", "-1GB", "80 GB free", "1e3", "0GB", "0.1", True]
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(EsftError, match="--memory"):
        memory_bytes(text)

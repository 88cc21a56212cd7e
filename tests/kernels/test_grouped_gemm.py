"""`grouped_gemm` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from esft_kernels.grouped_gemm import naive
from esft_kernels.grouped_gemm.triton import grouped_gemm
from expert_layers import error
from guarded_memory import GuardedMemory, is_poison
from routed_rows import (
    ROUTINGS,
    SELECTED,
    TOLERANCE,
    TRITON,
    E,
    H,
    I,
    double,
    matrices,
    random,
    routed,
)


def assert_matches_oracle(
    memory: GuardedMemory,
    name: str,
    num_selected: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "out in",
    gather: bool = True,
    bias: bool = False,
    slots: int | None = None,
) -> None:
    rows = routed(name, num_selected, memory)
    banks = matrices(num_selected, H, I, dtype=dtype, memory=memory, layout=layout, bias=bias)
    count = rows.place.shape[0] if gather else rows.flat.numel()
    x = random(count, H, dtype=dtype, memory=memory)
    y = grouped_gemm(x, banks, rows, gather=gather, config=TRITON, slots=slots)
    expected = naive.grouped_gemm(x.double(), double(banks), rows, gather=gather)
    end = int(rows.offsets[E if slots is None else slots])
    assert y.dtype == dtype
    assert error(y[:end], expected[:end]) < TOLERANCE[dtype]
    assert is_poison(y[end:]).all()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_oracle(name, gather, dtype, guarded):
    assert_matches_oracle(guarded, name, 2, gather=gather, dtype=dtype, bias=dtype.itemsize == 2)


@pytest.mark.parametrize("num_selected", SELECTED)
@pytest.mark.parametrize("layout", ["in out", "out in", "gaps"])
@pytest.mark.parametrize("bias", [False, True])
def test_any_share_and_layout(num_selected, layout, bias, guarded):
    assert_matches_oracle(guarded, "elsewhere", num_selected, layout=layout, bias=bias)


@pytest.mark.parametrize("slots", range(E + 1))
def test_computes_no_slot_above_the_limit(slots, guarded):
    assert_matches_oracle(guarded, "elsewhere", 2, slots=slots, bias=True)

"""`up_swiglu_fwd` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from esft_kernels import SwiGLU
from esft_kernels.up_swiglu_fwd import naive
from esft_kernels.up_swiglu_fwd.triton import up_swiglu_fwd
from expert_layers import error
from guarded_memory import GuardedMemory, is_poison
from routed_rows import (
    ROUTINGS,
    SELECTED,
    TOLERANCE,
    TRITON,
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
    interleaved: bool = False,
) -> None:
    rows = routed(name, num_selected, memory)
    up = matrices(num_selected, H, 2 * I, dtype=dtype, memory=memory, layout=layout)
    x = random(rows.place.shape[0], H, dtype=dtype, memory=memory)
    activation = SwiGLU(interleaved)
    found = up_swiglu_fwd(x, up, rows, activation, TRITON)
    expected = naive.up_swiglu_fwd(x.double(), double(up), rows, activation)
    held = int(rows.offsets[-1])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours[:held], theirs[:held]) < TOLERANCE[dtype]
        assert is_poison(ours[held:]).all()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_oracle(name, interleaved, dtype, guarded):
    assert_matches_oracle(guarded, name, 2, interleaved=interleaved, dtype=dtype)


@pytest.mark.parametrize("num_selected", SELECTED)
@pytest.mark.parametrize("layout", ["in out", "out in", "gaps"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_share_and_layout(num_selected, layout, interleaved, guarded):
    assert_matches_oracle(
        guarded, "elsewhere", num_selected, layout=layout, interleaved=interleaved
    )

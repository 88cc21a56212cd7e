"""`down_dact_bwd` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from esft_kernels import SwiGLU
from esft_kernels.bank import Matrices
from esft_kernels.down_dact_bwd import naive
from esft_kernels.down_dact_bwd.triton import down_dact_bwd
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
    interleaved: bool = False,
    split: int = 2,
    slots: int | None = None,
) -> None:
    rows = routed(name, num_selected, memory)
    down = matrices(num_selected, I, H, dtype=dtype, memory=memory, layout=layout)
    d_out = random(rows.place.shape[0], H, dtype=dtype, memory=memory)
    weight = random(*rows.place.shape, dtype=torch.float32, memory=memory, seed=9)
    held = int(rows.offsets[-1])
    z = random(rows.flat.numel(), 2 * I, dtype=dtype, memory=memory, seed=10)
    z[held:] = torch.nan  # as the forward leaves rows without an expert
    config = TRITON | {"SPLIT": split}
    activation = SwiGLU(interleaved)
    dz, gated, d_weight = down_dact_bwd(d_out, down, z, weight, rows, activation, config, slots)
    expected = naive.down_dact_bwd(
        d_out.double(), double(down), z.double(), weight.double(), rows, activation
    )
    end = held if slots is None else int(rows.offsets[slots])
    trained = min(int(rows.offsets[num_selected]), end)
    bound = TOLERANCE[dtype]
    assert dz.dtype == gated.dtype == dtype
    assert error(dz[:end], expected[0][:end]) < bound
    assert is_poison(dz[end:]).all()
    # No frozen expert's row takes the time to be written.
    assert gated.shape == (rows.flat.numel() if num_selected else 0, I)
    assert error(gated[:trained], expected[1][:trained]) < bound
    assert is_poison(gated[trained:]).all()
    computed = (rows.place >= 0) & (rows.place < end)
    assert d_weight.dtype == torch.float32
    assert error(d_weight[computed], expected[2][computed]) < bound
    assert (d_weight[~computed] == 0).all()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_oracle(name, interleaved, dtype, guarded):
    assert_matches_oracle(guarded, name, 2, interleaved=interleaved, dtype=dtype)


@pytest.mark.parametrize("num_selected", SELECTED)
@pytest.mark.parametrize("layout", ["in out", "out in", "gaps"])
def test_any_share_and_layout(num_selected, layout, guarded):
    assert_matches_oracle(guarded, "elsewhere", num_selected, layout=layout)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_epilogue_may_be_cut(split, interleaved, guarded):
    assert_matches_oracle(guarded, "uneven", 1, split=split, interleaved=interleaved)


@pytest.mark.parametrize("slots", range(E + 1))
def test_computes_no_slot_above_the_limit(slots, guarded):
    assert_matches_oracle(guarded, "elsewhere", 2, slots=slots)


def test_a_gate_s_gradient_is_summed_in_fp32(guarded):
    """Whole numbers, and gates so large that silu(gate) is the gate: exact in fp32, not in bf16."""
    rows = routed("all experts", 2, guarded)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, limit: int = 1) -> torch.Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).bfloat16()

    tokens, k = rows.place.shape
    d_out = draw(tokens, H)
    gate = torch.randint(33, 65, (tokens * k, I), generator=generator).bfloat16()
    z = torch.cat([gate, draw(tokens * k, I, limit=9)], -1)
    down = Matrices(draw(2, I, H), draw(E - 2, I, H))
    weight = torch.ones(tokens, k)
    config = TRITON | {"SPLIT": 2}
    *_, found = down_dact_bwd(d_out, down, z, weight, rows, SwiGLU(), config)
    *_, expected = naive.down_dact_bwd(
        d_out.double(), double(down), z.double(), weight.double(), rows, SwiGLU()
    )
    whole = expected.round()
    assert (whole - expected).abs().max() < 1e-4
    assert (whole.bfloat16() != whole).any()  # otherwise this test shows nothing
    assert torch.equal(found.double(), whole)

"""`gather_sum` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from esft_kernels.gather_sum import naive
from esft_kernels.gather_sum.triton import gather_sum
from expert_layers import error
from routed_rows import BLOCK_M, ROUTINGS, TOLERANCE, H, random, routed

CONFIG = {"BT": 16, "BH": 16}


@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "no expert"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gates", [None, torch.float32, torch.bfloat16])
def test_matches_oracle(name, dtype, gates, guarded):
    rows = routed(name, 2, guarded)
    y = random(rows.flat.numel(), H, dtype=dtype, memory=guarded)
    y[rows.offsets[-1] :] = torch.nan  # as a kernel leaves rows without an expert
    weight = expected_weight = None
    if gates is not None:
        weight = random(*rows.place.shape, dtype=gates, memory=guarded)
        weight[rows.place < 0] = torch.nan  # not even that may count
        expected_weight = weight.double()
    out = gather_sum(y, rows, weight, config=CONFIG)
    assert out.dtype == dtype
    assert error(out, naive.gather_sum(y.double(), rows, expected_weight)) < TOLERANCE[dtype]


@pytest.mark.parametrize("weighted", [False, True])
def test_an_id_that_names_no_expert_makes_its_token_nan(weighted, guarded):
    rows = routed("no expert", 2, guarded)
    y = random(rows.flat.numel(), H, dtype=torch.float32, memory=guarded)
    weight = random(*rows.place.shape, dtype=torch.float32, memory=guarded) if weighted else None
    out = gather_sum(y, rows, weight, config=CONFIG)
    bad = torch.zeros(rows.place.shape[0], dtype=torch.bool)
    bad[[2, 5, 7, 11]] = True  # not 9, one of whose experts is held elsewhere
    assert out[bad].isnan().all()
    expected = naive.gather_sum(y.double(), rows, None if weight is None else weight.double())
    assert expected[bad].isnan().all()
    assert error(out[~bad], expected[~bad]) < 1e-5


def test_sums_are_rounded_once(guarded):
    """Gates in fp32 with more digits than fp16 has: no product and no partial sum is rounded.

    Not in bf16: Triton's interpreter truncates to it, where a GPU rounds to the nearest.
    """
    rows = routed("all experts", 2, guarded)
    generator = torch.Generator().manual_seed(8)
    y = torch.randint(-100, 101, (rows.flat.numel(), H), generator=generator).half()
    weight = torch.randint(1, 4096, rows.place.shape, generator=generator) / 4096
    out = gather_sum(y, rows, weight, config=CONFIG)
    expected = naive.gather_sum(y.double(), rows, weight.double())
    assert (naive.gather_sum(y, rows, weight.half()) != expected.half()).any()
    assert torch.equal(out, expected.half())


def test_more_tokens_than_a_tile(programs, guarded):
    rows = routed("one expert", 0, guarded)
    gather_sum(
        random(rows.flat.numel(), H, dtype=torch.float32, memory=guarded), rows, config=CONFIG
    )
    assert len(programs) == 3 * 2
    assert rows.place.shape[0] % BLOCK_M

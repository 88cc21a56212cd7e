"""`wgrad_selected` against its oracle in float64."""

from __future__ import annotations

import pytest
import torch
from esft_kernels.rows import Rows
from esft_kernels.wgrad_selected import naive
from esft_kernels.wgrad_selected.triton import wgrad_selected
from expert_layers import error
from guarded_memory import GuardedMemory
from routed_rows import ROUTINGS, SELECTED, TOLERANCE, H, I, random, routed
from torch import Tensor

CONFIG = {"BP": 16, "BQ": 16, "BR": 16}
GATHERS = [(False, False), (False, True), (True, False)]


def operand(
    width: int, gather: bool, rows: Rows, num_selected: int, dtype: torch.dtype, m: GuardedMemory
) -> Tensor:
    """Draw p or q; rows that are not of a trainable expert hold NaN and must not be read."""
    if gather:
        return random(rows.place.shape[0], width, dtype=dtype, memory=m, seed=12)
    drawn = random(rows.flat.numel(), width, dtype=dtype, memory=m, seed=13)
    drawn[rows.offsets[num_selected] :] = torch.nan
    return drawn


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("gather_p", "gather_q"), GATHERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_oracle(name, gather_p, gather_q, dtype, guarded):
    rows = routed(name, 2, guarded)
    p = operand(2 * I, gather_p, rows, 2, dtype, guarded)
    q = operand(H, gather_q, rows, 2, dtype, guarded)
    how = {"gather_p": gather_p, "gather_q": gather_q}
    dw = wgrad_selected(p, q, rows, 2, **how, dtype=dtype, config=CONFIG)
    expected = naive.wgrad_selected(p.double(), q.double(), rows, 2, **how, dtype=torch.float64)
    assert dw.dtype == dtype
    assert error(dw, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_selected", SELECTED)
@pytest.mark.parametrize("name", ["uneven", "one expert"])
@pytest.mark.parametrize("width", [1, H])
def test_any_share(num_selected, name, width, guarded):
    """Experts without rows get zeros; a width of 1 is a bias."""
    rows = routed(name, num_selected, guarded)
    p = operand(width, False, rows, num_selected, torch.float32, guarded)
    q = operand(I, True, rows, num_selected, torch.float32, guarded)
    how = {"gather_p": False, "gather_q": True}
    dw = wgrad_selected(p, q, rows, num_selected, **how, dtype=torch.float32, config=CONFIG)
    expected = naive.wgrad_selected(
        p.double(), q.double(), rows, num_selected, **how, dtype=torch.float64
    )
    assert dw.shape == expected.shape
    assert error(dw, expected) < 1e-5
    counts = rows.offsets.diff()[:num_selected]
    if num_selected:
        assert (counts == 0).any()  # both routings leave an expert without rows
    assert (dw[counts == 0] == 0).all()


def test_sums_stay_in_fp32(guarded):
    """The gradient of an fp32 parameter is not rounded to the compute dtype on its way."""
    rows = routed("one expert", 2, guarded)
    generator = torch.Generator().manual_seed(14)

    def draw(width: int) -> Tensor:
        shape = (rows.flat.numel(), width)
        return torch.randint(-15, 16, shape, generator=generator).bfloat16()

    p, q = draw(H), draw(I)
    how = {"gather_p": False, "gather_q": False, "dtype": torch.float32}
    dw = wgrad_selected(p, q, rows, 2, **how, config=CONFIG)
    exact = p.double().t() @ q.double()
    assert (exact.bfloat16() != exact).any()  # otherwise this test shows nothing
    assert torch.equal(dw[1].double(), exact)
    assert (dw[0] == 0).all()

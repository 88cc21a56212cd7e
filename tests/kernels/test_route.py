"""`route`: the Triton version gives what plain Python lists give, in every field."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from esft_kernels.bank import slot_map
from esft_kernels.route import naive
from esft_kernels.route.triton import route
from esft_kernels.rows import ELSEWHERE, NO_EXPERT, Rows
from guarded_memory import GuardedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_rows import ROUTINGS, E, topk_index
from torch import Tensor

pytestmark = pytest.mark.usefixtures("guarded")


def assert_same(found: Rows, expected: Rows) -> None:
    for field in fields(Rows):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert ours.tolist() == theirs.tolist(), field.name
        else:
            assert ours == theirs, field.name


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("block_m", [1, 4, 16])
def test_matches_oracle(name, block_m):
    index, slot = topk_index(name), slot_map([4, 1], E)
    assert_same(route(index, slot, block_m), naive.route(index, slot, block_m))


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    experts, slots = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    tokens, k = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    # Some ids stand for an expert held elsewhere, some name none.
    ids = st.integers(-3, experts + 2)
    index = draw(st.lists(ids, min_size=tokens * k, max_size=tokens * k))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    # Ids may share a slot, and a slot may have none.
    slot = draw(st.lists(st.integers(0, slots - 1), min_size=experts, max_size=experts))
    block_m = draw(st.sampled_from([2, 16]))
    return torch.tensor(index, dtype=dtype).view(tokens, k), torch.tensor(slot), block_m, slots


# Three programs each.
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(routings())
def test_matches_oracle_on_any_routing(routing):
    assert_same(route(*routing), naive.route(*routing))


def test_more_rows_and_tiles_than_a_program_takes(programs):
    generator = torch.Generator().manual_seed(7)
    index = torch.randint(-1, 71, (700, 3), generator=generator)
    slot = slot_map([69, 3, 12], 70)
    assert_same(route(index, slot, 16), naive.route(index, slot, 16))
    assert len(programs) > 3


def test_inputs_may_have_gaps():
    index, slot = topk_index("elsewhere"), slot_map([4, 1], E)
    expected = naive.route(index, slot, 16)
    ids = torch.stack([index, index + 1], dim=-1)[..., 0]
    slots = torch.stack([slot, slot + 1], dim=-1)[..., 0]
    assert not ids.is_contiguous()
    assert not slots.is_contiguous()
    assert_same(route(ids, slots, 16), expected)


def test_reads_nothing_outside_the_slot_map(guarded: GuardedMemory):
    """An id that names no expert must not be looked up, and a wrong slot leads nowhere."""
    index = torch.tensor([[0, 1], [2, 2], [-(2**40), 3]])
    rows = route(index, guarded.fence(torch.tensor([0, 99, -4])), 16)
    assert rows.place.tolist() == [[0, NO_EXPERT], [NO_EXPERT, NO_EXPERT], [NO_EXPERT, ELSEWHERE]]
    assert rows.offsets.tolist() == [0, 1, 1, 1]

"""How a budget is divided."""

from __future__ import annotations

import pytest

from esft.errors import EsftError
from esft.offload.split import Split, split

EXPERTS = {1: 8, 2: 8, 5: 8}


def test_all_fit() -> None:
    parts = split(2400, experts=EXPERTS, expert_bytes=100, top_k=2)
    assert parts == Split({1: 8, 2: 8, 5: 8}, 1, 2)


@pytest.mark.parametrize("fit", range(2, 24))
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_everything_together_fits_and_little_is_left_over(fit: int, ahead: int) -> None:
    parts = split(fit * 100 + 99, experts=EXPERTS, expert_bytes=100, top_k=2, ahead=ahead)
    used = sum(parts.kept.values()) + parts.staging + parts.working
    assert used == fit
    assert parts.working >= 1
    assert parts.staging <= ahead
    assert parts.staging <= sum(parts.kept.values()) + 1
    assert max(parts.kept.values()) - min(parts.kept.values()) <= 1


def test_a_layer_of_few_experts_leaves_its_share_to_the_others() -> None:
    parts = split(1500, experts={1: 2, 2: 8, 3: 8}, expert_bytes=100, top_k=2, ahead=0)
    assert parts.kept == {1: 2, 2: 6, 3: 5}


def test_without_caches() -> None:
    for fit in (10, 24):
        parts = split(fit * 100, experts=EXPERTS, expert_bytes=100, top_k=2, keep=False)
        assert parts == Split({1: 0, 2: 0, 5: 0}, 1, 2)


def test_what_stays_and_what_is_computed_with_come_first() -> None:
    options = {"experts": EXPERTS, "expert_bytes": 100, "top_k": 2, "ahead": 0}
    bare = split(1000, **options)
    assert split(1770, pinned_bytes=720, scratch_bytes=50, **options) == bare


@pytest.mark.parametrize("budget", [1, 99, 199])
def test_less_than_a_token_needs_names_the_least(budget: int) -> None:
    with pytest.raises(EsftError, match=rf"{budget} bytes are too few.* at least 200 .*2 experts"):
        split(budget, experts=EXPERTS, expert_bytes=100, top_k=2)
    message = r"at least 1,070 .*2 experts of 100 B.*720 B for the delta's.*150 B for an expert"
    with pytest.raises(EsftError, match=message):
        split(
            1069,
            experts=EXPERTS,
            expert_bytes=100,
            top_k=2,
            pinned_bytes=720,
            scratch_bytes=150,
        )

"""How a budget is divided: what layers keep, what is on its way, what is being computed with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from esft.errors import EsftError
from esft.report import numerals


@dataclass(frozen=True)
class Split:
    """Numbers of experts that may be on the device at once; together they fit the budget.

    Attributes:
        kept: index of a layer -> how many of its experts its cache holds.
        staging: guessed ones, of layers to come.
        working: fetched because they were needed, until they have been computed with.
    """

    kept: Mapping[int, int]
    staging: int
    working: int


def split(
    budget: int,
    *,
    experts: Mapping[int, int],
    expert_bytes: int,
    top_k: int,
    ahead: int = 1,
    keep: bool = True,
    pinned_bytes: int = 0,
    scratch_bytes: int = 0,
) -> Split:
    """Divide a budget evenly among layers, after what all of them share.

    Two experts may be on their way because they are needed (one is computed with meanwhile), one
    where fewer than four fit. Of the rest speculation gets room for the likelier half of what a
    token uses, for each layer that it looks ahead (on tiny-moe three of four such guesses are
    right, of the other half two of five), but no more than half; the layers' caches get the rest.

    Args:
        budget: bytes.
        experts: index of a layer -> E.
        expert_bytes: of the largest expert, as the cache holds it.
        top_k: the most experts that a token uses of a layer.
        ahead: layers that speculation looks ahead.
        keep: whether layers have caches at all.
        pinned_bytes: of experts that stay, whatever happens: a delta's.
        scratch_bytes: for what is computed with, where that is not what the cache holds.

    Raises:
        EsftError: the budget does not hold what one token needs of a layer; names the least.
    """
    fit = (budget - pinned_bytes - scratch_bytes) // expert_bytes
    guesses = ahead * ((top_k + 1) // 2)
    if fit < top_k:
        raise EsftError(_too_small(budget, expert_bytes, top_k, pinned_bytes, scratch_bytes))
    if fit >= sum(experts.values()):  # then no two of what follows are the same expert
        return Split(dict(experts) if keep else dict.fromkeys(experts, 0), guesses, 2)
    working = 2 if fit >= 4 else 1
    staging = min(guesses, (fit - working) // 2)
    left = fit - working - staging if keep else 0
    kept = dict.fromkeys(experts, 0)
    while left and (open_ := [index for index in kept if kept[index] < experts[index]]):
        for index in open_[:left]:
            kept[index] += 1
        left -= min(left, len(open_))
    return Split(kept, staging, working)


def _too_small(
    budget: int, expert_bytes: int, top_k: int, pinned_bytes: int, scratch_bytes: int
) -> str:
    needs = [
        f"{top_k} experts of {numerals.size(expert_bytes)}, which a token uses in a layer",
    ]
    if pinned_bytes:
        needs.append(f"{numerals.size(pinned_bytes)} for the delta's experts, which stay")
    if scratch_bytes:
        needs.append(f"{numerals.size(scratch_bytes)} for an expert that is computed with")
    least = top_k * expert_bytes + pinned_bytes + scratch_bytes
    return (
        f"--expert-memory: {budget:,} bytes are too few; this model needs at least {least:,} "
        f"({numerals.size(least)}): {', '.join(needs)}"
    )

"""Experts bound together on paper: coarser granularity for a model that was trained with fine one.

The ESFT paper (arXiv 2407.01906) binds experts of a fine-grained model to see what coarser ones
would cost: a group is then selected as a whole. Here the groups are those that serve the same
tokens, and only the selection knows of them: the model routes as ever.
"""

from __future__ import annotations

from itertools import combinations

from esft.errors import SelectionError
from esft.ranking import until


def group_experts(cooccurrence: list[list[int]], size: int, layer: int) -> list[list[int]]:
    """Put a layer's experts into groups of those that serve the same tokens.

    A greedy matching: of all pairs, the one whose experts serve the most tokens together is bound
    first, then the best pair of those left, and so on; equal ones in the order of their ids. For
    groups of four, pairs are matched in the same way, by the sum over their members.

    Args:
        cooccurrence: `[E][E]`, see `esft.layer_scores.LayerScores`.
        size: 2 or 4.
        layer: what errors call it.

    Returns:
        the groups by their lowest id, each by ascending id.

    Raises:
        SelectionError: E is not a multiple of the size.
    """
    experts = len(cooccurrence)
    if experts % size:
        raise SelectionError(f"--group {size}: layer {layer} has {experts} experts, no multiple")
    groups = [[expert] for expert in range(experts)]
    while len(groups[0]) < size:
        groups = _matched(groups, cooccurrence)
    return groups


def until_groups(scores: list[float], groups: list[list[int]], p: float) -> list[int]:
    """Return the experts of the best groups, added while the running sum is below p.

    Args:
        scores: `[E]`; a group's score is the sum of its members', by ascending id.
        groups: from `group_experts`; equal ones in this order.
        p: as in `esft.ranking.until`.

    Returns:
        whole groups, the best one first, in a group the best expert first.
    """
    totals = [sum(scores[expert] for expert in group) for group in groups]
    return [
        expert
        for place in until(totals, p)
        for expert in sorted(groups[place], key=lambda expert: (-scores[expert], expert))
    ]


def _matched(groups: list[list[int]], cooccurrence: list[list[int]]) -> list[list[int]]:
    """Bind groups two by two, those first that meet most often."""

    def meetings(pair: tuple[int, int]) -> int:
        return sum(cooccurrence[a][b] for a in groups[pair[0]] for b in groups[pair[1]])

    # Sorting is stable: equal pairs stay in the order of their ids.
    free = set(range(len(groups)))
    bound = []
    for a, b in sorted(combinations(range(len(groups)), 2), key=meetings, reverse=True):
        if a in free and b in free:
            free -= {a, b}
            bound.append(sorted(groups[a] + groups[b]))
    return sorted(bound)

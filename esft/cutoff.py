"""The p rule: each layer's best experts, or groups of experts, until their scores reach p."""

from __future__ import annotations

from collections.abc import Mapping

from esft.errors import SelectionError
from esft.grouping import group_experts, until_groups
from esft.layer_scores import HalfScores, LayerScores
from esft.ranking import rounded, shares, until
from esft.selection_rule import Rule
from esft.stability import AutoP, Experts, Rows, choose_p


def until_p(rule: Rule, layers: Mapping[int, LayerScores]) -> tuple[Experts, AutoP | None]:
    """Select experts by their running sum.

    Args:
        rule: with a `p`, or with a `cover` to find one for.
        layers: the layers to select in.

    Returns:
        by layer the experts, best first; and how p was found, if it was.

    Raises:
        SelectionError: a layer's scores are all 0, or do not say what the rule needs, or no p
            reaches `cover`.
    """
    groups = {
        layer: _groups(scores, rule.group, layer)
        for layer, scores in layers.items()
        if rule.group is not None
    }

    def pick(rows: Rows, p: float) -> Experts:
        return {
            layer: until_groups(row, groups[layer], p) if groups else until(row, p)
            for layer, row in rows.items()
        }

    def rows_of(scores: Mapping[int, LayerScores] | Mapping[int, HalfScores]) -> Rows:
        rows = {layer: rounded(x.metric(rule.metric), rule.round) for layer, x in scores.items()}
        if rule.mass == "raw":
            return rows
        return {layer: shares(row, layer) for layer, row in rows.items()}

    whole = rows_of(layers)
    if rule.cover is None:
        assert rule.p is not None  # `make_rule` sets one of the two
        return pick(whole, rule.p), None
    found = choose_p(whole, [rows_of(half) for half in _halves(layers)], pick, rule.cover)
    return pick(whole, found.p), found


def _groups(scores: LayerScores, size: int, layer: int) -> list[list[int]]:
    if scores.cooccurrence is None:
        raise SelectionError(
            f"--group {size}: the scores do not say which experts of layer {layer} serve the same "
            f"tokens; profile with --cooccurrence"
        )
    return group_experts(scores.cooccurrence, size, layer)


def _halves(layers: Mapping[int, LayerScores]) -> list[dict[int, HalfScores]]:
    for layer, scores in layers.items():
        if not scores.halves:
            raise SelectionError(
                f"--p auto: the scores do not say layer {layer}'s on each half of the sample; "
                f"profile again, with at least two rows"
            )
    return [{layer: scores.halves[half] for layer, scores in layers.items()} for half in (0, 1)]

"""From a layer's scores to its best experts: the arithmetic of every selection rule.

Ties go to the lower id, and sums run from left to right in float64, so that the same scores give
the same experts everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from esft.errors import SelectionError
from esft.selection_rule import Budget


def ranking(scores: list[float]) -> list[int]:
    """Return all expert ids by descending score `[E]`."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))


def rounded(scores: list[float], decimals: int | None) -> list[float]:
    """Return scores `[E]` rounded to so many decimals, or as they are."""
    return scores if decimals is None else [round(score, decimals) for score in scores]


def shares(scores: list[float], layer: int) -> list[float]:
    """Return scores `[E]` divided by their sum.

    Raises:
        SelectionError: all are 0.
    """
    total = sum(scores)
    if total <= 0:
        raise SelectionError(f"layer {layer}: all its scores are 0; leave it out with --layers")
    return [score / total for score in scores]


def until(scores: list[float], p: float) -> list[int]:
    """Return the best experts, added while the running sum of their scores `[E]` is below p."""
    total, chosen = 0.0, []
    for expert in ranking(scores):
        if total >= p:
            break
        chosen.append(expert)
        total += scores[expert]
    return chosen


def best(scores: list[float], n: int, layer: int) -> list[int]:
    """Return the n best experts.

    Raises:
        SelectionError: the layer has fewer.
    """
    if n > len(scores):
        raise SelectionError(f"--top-n {n}: layer {layer} has {len(scores)} experts")
    return ranking(scores)[:n]


def within(rows: dict[int, list[float]], count: int) -> dict[int, list[int]]:
    """Return the `count` experts with the highest shares over all layers; layers may get none.

    Equal shares go to the lower layer, then to the lower id.

    Args:
        rows: scores `[E]` by layer.
        count: experts in all layers together.

    Raises:
        SelectionError: all scores of a layer are 0.
    """
    ranked = sorted(
        (-share, layer, expert)
        for layer, row in rows.items()
        for expert, share in enumerate(shares(row, layer))
    )
    experts: dict[int, list[int]] = {}
    for _, layer, expert in ranked[:count]:
        experts.setdefault(layer, []).append(expert)
    return experts


def affordable(budget: Budget, model: Mapping[str, Any]) -> int:
    """Return how many experts a budget pays for.

    Args:
        budget: parameters, bytes of the delta's weights, or a share of the model.
        model: the model's sizes, keys of `esft.scores.UNKNOWN_MODEL`.

    Raises:
        SelectionError: a size is not known, or the budget is below one expert.
    """

    def size_of(key: str) -> int:
        if model.get(key) is None:
            raise SelectionError(
                f"--budget {budget.text}: the scores do not say the model's {key}; profile the "
                f"model with esft, or select with --p or --top-n"
            )
        return int(model[key])

    expert, limit = size_of("expert_parameters"), budget.amount
    if budget.unit == "share":
        limit *= size_of("parameters")
    elif budget.unit == "bytes":
        expert *= size_of("bytes_per_parameter")
    if limit < expert:
        unit = "bytes" if budget.unit == "bytes" else "parameters"
        raise SelectionError(
            f"--budget {budget.text} selects nothing: one expert has {expert:,} {unit} and "
            f"the budget is {int(limit):,}"
        )
    return int(limit // expert)


def draw(seed: int, layer: int, experts: int, n: int, without: Collection[int] = ()) -> list[int]:
    """Draw n of a layer's experts: those whose sha256 of `seed/layer/id` is lowest, by id.

    A hash, not a generator: every language and version draws the same.

    Args:
        seed: of the draw.
        layer: the layer's index.
        experts: E.
        n: how many.
        without: ids that are not drawn.

    Raises:
        SelectionError: fewer than n are left.
    """

    def key(expert: int) -> bytes:
        return hashlib.sha256(f"{seed}/{layer}/{expert}".encode()).digest()

    left = [expert for expert in range(experts) if expert not in without]
    if n > len(left):
        raise SelectionError(
            f"--random-from unselected: in layer {layer} the rule selects {n} of {experts} "
            f"experts, and as many others are not left; select fewer, or draw from all"
        )
    return sorted(sorted(left, key=key)[:n])

"""How far the experts of one task are those of another: score files compared.

Two questions: how different are the scores (`diff`), and how many of the selected experts do
selections share (`overlap`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.errors import SelectionError
from esft.ranking import shares
from esft.scores import Scores
from esft.selection import select


@dataclass(frozen=True)
class LayerDifference:
    """How far two scores of one layer are apart.

    Attributes:
        distance: half the L1 distance of the shares, 0 to 1: how much of the routed mass would
            have to go to other experts.
        rank_correlation: Spearman's, -1 to 1, see `rank_correlation`; None where undefined.
        entered: experts that only the second selection has, best first.
        left: experts that only the first selection has, best first.
        overlap: Jaccard index of the two selections, see `jaccard`.
    """

    distance: float
    rank_correlation: float | None
    entered: list[int]
    left: list[int]
    overlap: float


@dataclass(frozen=True)
class Difference:
    """How far two scores are apart.

    Attributes:
        layers: by layer index.
        distance: mean over the layers.
        rank_correlation: mean over the layers that have one; None if no layer does.
        overlap: Jaccard index of all selected experts together.
    """

    layers: dict[int, LayerDifference]
    distance: float
    rank_correlation: float | None
    overlap: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)


@dataclass(frozen=True)
class Overlap:
    """Which share of their experts several selections have in common, two by two.

    Attributes:
        names: of the n selections.
        total: Jaccard index of each pair over all layers, `[n][n]`, 1 on the diagonal.
        layers: the same by layer index.
        experts: how many experts each selection has.
    """

    names: list[str]
    total: list[list[float]]
    layers: dict[int, list[list[float]]]
    experts: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)


def diff(a: Scores, b: Scores, **rule: Any) -> Difference:
    """Compare the scores of two tasks, layer by layer.

    Args:
        a: the scores of the first task.
        b: those of the second, on the same layers and experts.
        rule: options of `esft.select` for the two selections; `metric` is also what is compared.

    Raises:
        SelectionError: the layers or experts differ, the rule is wrong, or a layer has no scores.
    """
    _same_experts({"the first": a, "the second": b})
    selections = [select(scores, **rule) for scores in (a, b)]
    first, second = (selection.experts for selection in selections)
    metric = selections[0].rule["metric"]
    layers = {}
    for layer in _layers(first, second):
        x, y = (shares(scores.layers[layer].metric(metric), layer) for scores in (a, b))
        old, new = first.get(layer, []), second.get(layer, [])
        layers[layer] = LayerDifference(
            distance=math.fsum(abs(p - q) for p, q in zip(x, y, strict=True)) / 2,
            rank_correlation=rank_correlation(x, y),
            entered=[expert for expert in new if expert not in old],
            left=[expert for expert in old if expert not in new],
            overlap=jaccard(set(old), set(new)),
        )
    correlations = [
        found.rank_correlation for found in layers.values() if found.rank_correlation is not None
    ]
    return Difference(
        layers=layers,
        distance=statistics.fmean(found.distance for found in layers.values()),
        rank_correlation=statistics.fmean(correlations) if correlations else None,
        overlap=jaccard(_all(first), _all(second)),
    )


def overlap(tasks: Mapping[str, Scores], **rule: Any) -> Overlap:
    """Tell how many of their selected experts tasks share.

    Args:
        tasks: scores by the tasks' names, at least two, on the same layers and experts.
        rule: options of `esft.select`, the same for all.

    Raises:
        SelectionError: the layers or experts differ, or the rule is wrong.
    """
    if len(tasks) < 2:
        raise SelectionError("an overlap needs the scores of at least two tasks")
    _same_experts(tasks)
    return shared({name: select(scores, **rule).experts for name, scores in tasks.items()})


def shared(selections: Mapping[str, dict[int, list[int]]]) -> Overlap:
    """Tell how many experts selections share.

    Args:
        selections: layer -> experts, by the names of what they are for; of the same model.
    """
    chosen = list(selections.values())
    return Overlap(
        names=list(selections),
        total=_pairs([_all(experts) for experts in chosen]),
        layers={
            layer: _pairs([set(experts.get(layer, [])) for experts in chosen])
            for layer in _layers(*chosen)
        },
        experts=[len(_all(experts)) for experts in chosen],
    )


def task_names(paths: Sequence[Path]) -> list[str]:
    """Return names for score files: without folder and suffix, or in full where these are equal.

    Raises:
        SelectionError: a file is given twice.
    """
    if twice := next((path for place, path in enumerate(paths) if path in paths[:place]), None):
        raise SelectionError(f"{twice}: given twice")
    stems = [path.stem for path in paths]
    return [
        str(path) if stems.count(stem) > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]


def jaccard(a: set[Any], b: set[Any]) -> float:
    """Return the Jaccard index, |a and b| / |a or b|, 0 to 1; 1 if both are empty."""
    return len(a & b) / len(a | b) if a | b else 1.0


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank.

    None where it is not defined: all of `x` or all of `y` are equal.
    """
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(order)))}
    last = {value: place for place, value in enumerate(order)}
    return [(first[value] + last[value]) / 2 for value in values]


def _layers(*chosen: dict[int, list[int]]) -> list[int]:
    """Return the layers that at least one selection has."""
    return sorted({layer for experts in chosen for layer in experts})


def _all(experts: dict[int, list[int]]) -> set[tuple[int, int]]:
    return {(layer, expert) for layer, ids in experts.items() for expert in ids}


def _pairs(sets: list[set[Any]]) -> list[list[float]]:
    return [[jaccard(a, b) for b in sets] for a in sets]


def _same_experts(tasks: Mapping[str, Scores]) -> None:
    """Refuse scores of different models."""
    (name, first), *others = tasks.items()
    for other, scores in others:
        for layer in sorted(first.layers.keys() | scores.layers.keys()):
            here, there = first.layers.get(layer), scores.layers.get(layer)
            if here is None or there is None:
                has, lacks = (name, other) if there is None else (other, name)
                raise SelectionError(
                    f"{has} has scores of layer {layer} and {lacks} has none; compare scores of "
                    f"the same model"
                )
            if here.experts != there.experts:
                raise SelectionError(
                    f"layer {layer}: {name} has {here.experts} experts and {other} has "
                    f"{there.experts}; compare scores of the same model"
                )

"""How sure a selection is: what of it remains on half of the sample, and which p makes it sure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from esft.errors import SelectionError
from esft.layer_scores import METRICS, LayerScores
from esft.ranking import shares, until

STABLE = 0.9  # of the selected experts must stay: what `--p auto` asks for
STEPS = 100  # it tries p in hundredths

Rows = Mapping[int, list[float]]  # by layer index: shares, [E]
Experts = dict[int, list[int]]  # by layer index: ids, best first
Pick = Callable[[Rows, float], Experts]


@dataclass(frozen=True)
class AutoP:
    """A p that was found rather than given.

    Attributes:
        p: the smallest, in hundredths, that is stable and covers enough.
        cover: what was asked for.
        covered: what is reached, see `choose_p`.
        stability: share of the selected experts that stay selected on half of the sample.
    """

    p: float
    cover: float
    covered: float
    stability: float

    def to_dict(self) -> dict[str, Any]:
        """Return what a selection file says of it."""
        return asdict(self) | {"stable": STABLE, "why": self.why()}

    def why(self) -> str:
        """Say in one line why it is this p."""
        return (
            f"p {self.p:g} is the smallest at which {_percent(self.stability)} of the selected "
            f"experts stay selected on half of the sample (asked: {_percent(STABLE)}) and experts "
            f"chosen on one half get {_percent(self.covered)} of the scores on the other (asked: "
            f"{_percent(self.cover)})"
        )


def choose_p(whole: Rows, halves: Sequence[Rows], pick: Pick, cover: float) -> AutoP:
    """Return the smallest p at which a selection is stable and covers enough.

    Stable: of the experts selected on the whole sample, over all layers, at least `STABLE` stay
    selected on a half of it, averaged over the halves. Covers: the experts selected on one half
    get at least `cover` of the other half's scores, averaged over the layers and both ways. On the
    rows that chose them they would get p by definition; on others they get less.

    Args:
        whole: the shares on the whole sample.
        halves: on each half of it.
        pick: selects experts from shares at a p.
        cover: above 0, at most 1.

    Raises:
        SelectionError: no p up to 1 does.
    """
    best = AutoP(1.0, cover, 0.0, 0.0)
    for step in range(1, STEPS + 1):
        p = step / STEPS
        parts = [pick(rows, p) for rows in halves]
        best = AutoP(
            p=p,
            cover=cover,
            covered=statistics.fmean(
                sum(other[layer][expert] for expert in experts)
                for part, other in zip(parts, reversed(halves), strict=True)
                for layer, experts in part.items()
            ),
            stability=kept(pick(whole, p), parts),
        )
        if best.covered >= cover and best.stability >= STABLE:
            return best
    raise SelectionError(
        f"--p auto: no p makes the selection stable and covers {_percent(cover)}: at p 1, "
        f"{_percent(best.stability)} of the experts stay selected on half of the sample and those "
        f"chosen on one half get {_percent(best.covered)} of the scores on the other; profile more "
        f"tokens, or ask for a lower --cover"
    )


def stability(
    whole: Mapping[int, LayerScores], parts: Sequence[Mapping[int, LayerScores]], p: float
) -> dict[str, float]:
    """Say how sure a selection is.

    Returns:
        `p`, and by metric the share of the experts selected at `p` on the whole sample that stay
        selected on a part of it, over all layers, averaged over the parts.
    """
    result = {"p": p}
    for metric in METRICS:
        result[metric] = kept(
            _select(whole, metric, p), [_select(part, metric, p) for part in parts]
        )
    return result


def kept(whole: Experts, parts: Sequence[Experts]) -> float:
    """Return the share of a selection's experts that are in another one, averaged over those."""
    number = sum(map(len, whole.values()))
    return statistics.fmean(
        sum(len(set(ids) & set(part.get(layer, ()))) for layer, ids in whole.items()) / number
        for part in parts
    )


def _select(layers: Mapping[int, LayerScores], metric: str, p: float) -> Experts:
    return {index: until(shares(layer.metric(metric), index), p) for index, layer in layers.items()}


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"

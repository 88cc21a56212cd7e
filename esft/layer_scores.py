"""The scores of one layer's experts, and how they stand in a file of the format `esft-scores/1`.

The format is described in docs/scores-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from esft.diagnostics import CAPACITY_FACTORS, FixedByToken, Routing
from esft.errors import SelectionError, nearest

METRICS = ("token", "gate")

_KEYS = ("experts", "top_k", "tokens", *METRICS, "halves", "routing", "cooccurrence")
_HALF_KEYS = ("tokens", *METRICS)
_ROUTING_KEYS = ("entropy", "imbalance", "dropped", "fixed_by_token")
_FIXED_KEYS = ("share", "without_id", "token_ids", "tokens")


@dataclass(frozen=True)
class HalfScores:
    """The scores over one half of the sample.

    Attributes:
        tokens: tokens counted in it.
        token: `[E]`, as in `LayerScores`.
        gate: `[E]`, as in `LayerScores`.
    """

    tokens: int
    token: list[float]
    gate: list[float]

    def metric(self, name: str) -> list[float]:
        """Return the scores `[E]` of a metric, `token` or `gate`."""
        return {"token": self.token, "gate": self.gate}[name]


@dataclass(frozen=True)
class LayerScores:
    """The scores of one layer's E routed experts.

    Attributes:
        experts: E.
        top_k: K, experts per token; None where unknown.
        tokens: tokens counted; None where unknown.
        token: TSR, `[E]`: share of the tokens whose top-K holds the expert, divided by K.
        gate: AGS, `[E]`: mean gate value over the tokens, 0 where the expert is not in the top-K.
        halves: the two halves of the sample by themselves; empty where unknown.
        routing: how even the routing is; None where unknown.
        cooccurrence: `[E][E]`: how many tokens chose both experts, on the diagonal how many chose
            the one; None where not counted.
    """

    experts: int
    top_k: int | None
    tokens: int | None
    token: list[float]
    gate: list[float]
    halves: tuple[HalfScores, ...] = ()
    routing: Routing | None = None
    cooccurrence: list[list[int]] | None = None

    def metric(self, name: str) -> list[float]:
        """Return the scores `[E]` of a metric, `token` or `gate`."""
        return {"token": self.token, "gate": self.gate}[name]

    def counts(self) -> list[int]:
        """Return how often each expert was chosen, `[E]`; K and the tokens must be known."""
        if self.top_k is None or self.tokens is None:
            raise SelectionError("the scores do not say how many tokens and experts were counted")
        return [round(share * self.top_k * self.tokens) for share in self.token]

    def to_dict(self) -> dict[str, Any]:
        """Return a layer's entry in a scores file; what is not known is left out."""
        entry = {key: getattr(self, key) for key in ("experts", "top_k", "tokens", *METRICS)}
        if self.halves:
            entry["halves"] = [asdict(half) for half in self.halves]
        if self.routing is not None:
            entry["routing"] = asdict(self.routing)
        if self.cooccurrence is not None:
            entry["cooccurrence"] = self.cooccurrence
        return entry

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Self:
        """Check and take over a layer's entry.

        Args:
            value: the parsed JSON.
            where: what errors call it.

        Raises:
            SelectionError: a key is missing, unknown or has a wrong value; it is named.
        """
        layer = mapping(value, where)
        known_keys(layer, _KEYS, where)
        experts = count(layer.get("experts"), f"{where}: experts")
        if experts is None:
            raise SelectionError(f"{where}: experts: missing; expected the number of experts")
        top_k = count(layer.get("top_k"), f"{where}: top_k")
        if top_k is not None and top_k > experts:
            raise SelectionError(f"{where}: top_k: {top_k} of {experts} experts")
        return cls(
            experts=experts,
            top_k=top_k,
            tokens=count(layer.get("tokens"), f"{where}: tokens"),
            token=score_row(layer.get("token"), experts, f"{where}: token"),
            gate=score_row(layer.get("gate"), experts, f"{where}: gate"),
            halves=_halves(layer.get("halves"), experts, f"{where}: halves"),
            routing=_routing(layer.get("routing"), f"{where}: routing"),
            cooccurrence=_square(layer.get("cooccurrence"), experts, f"{where}: cooccurrence"),
        )


def _halves(value: Any, experts: int, where: str) -> tuple[HalfScores, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != 2:
        raise SelectionError(f"{where}: expected a list of two halves")
    halves = []
    for number_, item in enumerate(value):
        place = f"{where}: {number_}"
        half = mapping(item, place)
        known_keys(half, _HALF_KEYS, place)
        tokens = count(half.get("tokens"), f"{place}: tokens")
        if tokens is None:
            raise SelectionError(f"{place}: tokens: missing; expected the number of tokens")
        token, gate = (score_row(half.get(key), experts, f"{place}: {key}") for key in METRICS)
        halves.append(HalfScores(tokens, token, gate))
    return tuple(halves)


def _routing(value: Any, where: str) -> Routing | None:
    if value is None:
        return None
    facts = mapping(value, where)
    known_keys(facts, _ROUTING_KEYS, where)
    dropped = mapping(facts.get("dropped"), f"{where}: dropped")
    known_keys(dropped, tuple(CAPACITY_FACTORS), f"{where}: dropped")
    fixed, place = facts.get("fixed_by_token"), f"{where}: fixed_by_token"
    if fixed is not None:
        known_keys(mapping(fixed, place), _FIXED_KEYS, place)
        fixed = FixedByToken(
            share=number(fixed.get("share"), f"{place}: share"),
            without_id=number(fixed.get("without_id"), f"{place}: without_id"),
            token_ids=count(fixed.get("token_ids"), f"{place}: token_ids") or 0,
            tokens=count(fixed.get("tokens"), f"{place}: tokens") or 0,
        )
    return Routing(
        entropy=number(facts.get("entropy"), f"{where}: entropy"),
        imbalance=number(facts.get("imbalance"), f"{where}: imbalance"),
        dropped={
            name: number(share, f"{where}: dropped: {name}") for name, share in dropped.items()
        },
        fixed_by_token=fixed,
    )


def _square(value: Any, experts: int, where: str) -> list[list[int]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != experts:
        raise SelectionError(f"{where}: expected {experts} rows, one an expert")
    for expert, counts in enumerate(value):
        if not isinstance(counts, list) or len(counts) != experts:
            raise SelectionError(f"{where}: row {expert}: expected {experts} counts")
        if not all(type(item) is int and item >= 0 for item in counts):
            raise SelectionError(f"{where}: row {expert}: expected whole numbers of at least 0")
    for a, counts in enumerate(value):
        for b in range(a):
            if counts[b] != value[b][a]:
                raise SelectionError(
                    f"{where}: experts {b} and {a}: {value[b][a]} one way, {counts[b]} the other"
                )
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a JSON object as it is.

    Raises:
        SelectionError: it is none.
    """
    if not isinstance(value, dict):
        raise SelectionError(f"{where}: missing, or not a JSON object")
    return value


def known_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a key that is not among `known`.

    Raises:
        SelectionError: the key, and the nearest known one.
    """
    for key in value:
        if key not in known:
            raise SelectionError(f'{where}: unknown key "{key}"{nearest(key, known)}')


def score_row(value: Any, experts: int, where: str) -> list[float]:
    """Return E finite scores of at least 0.

    Raises:
        SelectionError: they are something else.
    """
    if not isinstance(value, list):
        raise SelectionError(f"{where}: missing, or not a list")
    if len(value) != experts or not value:
        raise SelectionError(f"{where}: {len(value)} scores for {experts} experts")
    return [number(score, f"{where}: expert {expert}") for expert, score in enumerate(value)]


def number(value: Any, where: str) -> float:
    """Return a finite number of at least 0.

    Raises:
        SelectionError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SelectionError(f"{where}: {value!r} is not a number")
    if not math.isfinite(value) or value < 0:
        raise SelectionError(f"{where}: {value} is not a finite number of at least 0")
    return float(value)


def count(value: Any, where: str) -> int | None:
    """Return a whole number of at least 1, or None.

    Raises:
        SelectionError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SelectionError(f"{where}: {value!r} is not a whole number of at least 1")
    return value

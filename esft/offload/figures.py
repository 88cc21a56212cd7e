"""What was counted while a model ran with fewer experts at hand than it has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from esft.report import numerals


@dataclass
class Passes:
    """Counts over forward passes of one kind.

    An expert is *needed* once in each pass of its layer in which a token has chosen it.

    Attributes:
        tokens: positions, padding included.
        seconds: that the passes took.
        needed: how often an expert was needed.
        pinned: how often it was a delta's, which stays.
        hits: how often it was in its layer's cache.
        staged: how often it was not, but had been guessed and fetched, or was on its way.
        guessable: how often an expert was needed of a layer for which there was a guess.
        guessed: how often it was then among those guessed, whether at hand already or not.
    """

    tokens: int = 0
    seconds: float = 0.0
    needed: int = 0
    pinned: int = 0
    hits: int = 0
    staged: int = 0
    guessable: int = 0
    guessed: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first pass."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts, a delta's aside, that were in the cache."""
        return _share(self.hits, self.needed - self.pinned)

    @property
    def staged_rate(self) -> float | None:
        """Share of those that were not in the cache which speculation had fetched, or begun to."""
        return _share(self.staged, self.needed - self.pinned - self.hits)

    @property
    def recall(self) -> float | None:
        """Share of a layer's needed experts that had been guessed for it."""
        return _share(self.guessed, self.guessable)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "hit_rate": self.hit_rate,
            "staged_rate": self.staged_rate,
            "recall": self.recall,
        }


@dataclass
class OffloadFigures:
    """What happened since a model was opened.

    Attributes:
        read: passes over several positions at a time: prompts, rows that are scored.
        written: passes over one position of each row: an answer's tokens.
        fetched: experts that were brought from the store, guessed ones included.
        wasted: those of them that were guessed, and not needed in the pass they were guessed for.
        bytes_moved: from the store, as the cache holds the experts.
        expert_bytes: the most that experts took at any time, pinned ones and those on their way
            included; room for one that is computed with, where the cache's are quantised, is not.
        store_bytes: of all experts where they are stored.
    """

    read: Passes = field(default_factory=Passes)
    written: Passes = field(default_factory=Passes)
    fetched: int = 0
    wasted: int = 0
    bytes_moved: int = 0
    expert_bytes: int = 0
    store_bytes: int = 0

    def __post_init__(self) -> None:
        self.now = self.read  # the kind of the pass that runs

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"read": self.read.to_dict(), "written": self.written.to_dict()}

    def summary(self) -> str:
        """Return the figures in one line for people."""
        parts = []
        for kind, passes in (("read", self.read), ("written", self.written)):
            rate = passes.tokens_per_second
            if rate is None:
                continue
            parts.append(
                f"{passes.tokens:,} tokens {kind}, {rate:,.1f} a second: of the experts needed "
                f"{_percent(passes.hit_rate)} were cached, {_percent(passes.recall)} guessed"
            )
        parts.append(
            f"{numerals.size(self.bytes_moved)} moved, {numerals.size(self.expert_bytes)} of "
            f"experts at hand at most"
        )
        return "; ".join(parts)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "none" if share is None else numerals.share(share)

"""Rows as a model is given them: text again, and which of it is learnt."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from esft.data.example import IGNORED
from esft.data.packing import Item, TrainSet
from esft.errors import DataError

# Tokens decoded before a piece: some tokenizers drop a space at the start of what they decode.
_BEFORE = 8
_MARK = re.compile(r"(?<=\{)(?=[+=])|(?<=[+=])(?=\})")  # between its two characters
_BIDIRECTIONAL = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}


class Segment(NamedTuple):
    """Neighbouring tokens that are treated alike, as text.

    Attributes:
        text: control characters escaped, line breaks and tabs as they are.
        learnt: whether they have labels.
        special: whether it is one special token (text that only looks like one is not).
        weight: factor of their losses.
    """

    text: str
    learnt: bool
    special: bool
    weight: float


@dataclass(frozen=True)
class ShownRow:
    """A row of a train set.

    Attributes:
        where: `file:line`.
        input_ids: S token ids.
        labels: S labels, `IGNORED` where nothing is learnt.
        weights: S factors of the tokens' losses; None where all are 1.
        segments: the whole, in order.
    """

    where: str
    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None
    segments: list[Segment]

    @property
    def learnt(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORED for label in self.labels)

    def marked(self) -> str:
        """Return the text with marks instead of colours, as `git diff --word-diff` has them.

        `{+learnt+}`, with a weight `{+x0.5:learnt+}`, and `{=special token=}`. A backslash parts
        what would be a mark in the text itself.
        """
        parts = []
        for (learnt, weight), group in groupby(self.segments, key=lambda s: (s.learnt, s.weight)):
            inner = "".join(
                f"{{={_parted(s.text)}=}}" if s.special else _parted(s.text) for s in group
            )
            factor = "" if weight == 1 else f"x{weight:g}:"
            parts.append(f"{{+{factor}{inner}+}}" if learnt else inner)
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        found = {**vars(self), "segments": [piece._asdict() for piece in self.segments]}
        return {**found, "tokens": len(self.input_ids), "learnt": self.learnt}


def show_rows(
    train_set: TrainSet, tokenizer: Any, count: int, *, seed: int | None = None
) -> list[ShownRow]:
    """Return rows of a train set, taken from the items that a trainer draws.

    Args:
        train_set: packed or not.
        tokenizer: the one that it was encoded with.
        count: how many; fewer come back if the set has fewer.
        seed: draw them by chance, in the set's order; None takes the first ones.

    Raises:
        DataError: `count` is negative.
    """
    if count < 0:
        raise DataError(f"--rows {count}: expected 0 or more")
    places = [(item, n) for item, rows in enumerate(train_set.where) for n in range(len(rows))]
    if seed is None:
        drawn = places[:count]
    else:
        drawn = sorted(random.Random(seed).sample(places, min(count, len(places))))
    special = _special_ids(tokenizer)
    shown = []
    for item, n in drawn:
        start, stop = _bounds(train_set[item])[n]
        ids, labels, weights = (
            train_set[item].get(key, [])[start:stop]
            for key in ("input_ids", "labels", "loss_weights")
        )
        segments = list(_segments(ids, labels, weights or [1.0] * len(ids), tokenizer, special))
        shown.append(ShownRow(train_set.where[item][n], ids, labels, weights or None, segments))
    return shown


def _bounds(item: Item) -> list[tuple[int, int]]:
    """Return where an item's rows start and stop; padding at its end counts as one more."""
    length = len(item["input_ids"])
    if "position_ids" not in item:
        return [(0, length)]
    starts = [place for place, position in enumerate(item["position_ids"]) if position == 0]
    return list(zip(starts, [*starts[1:], length], strict=True))


def _segments(
    ids: list[int], labels: list[int], weights: list[float], tokenizer: Any, special: set[int]
) -> Iterator[Segment]:
    def alike(place: int) -> tuple[Any, ...]:
        learnt = labels[place] != IGNORED
        alone = ids[place] in special
        return learnt, weights[place] if learnt else 1.0, place if alone else -1

    for (learnt, weight, alone), group in groupby(range(len(ids)), key=alike):
        places = list(group)
        text = _text(ids, places[0], places[-1] + 1, tokenizer)
        yield Segment(_visible(text), learnt, alone >= 0, weight)


def _text(ids: list[int], start: int, stop: int, tokenizer: Any) -> str:
    """Return what the tokens from `start` up to `stop` add to those before them."""
    first = max(0, start - _BEFORE)
    before, whole = (
        tokenizer.decode(
            ids[first:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        for end in (start, stop)
    )
    if whole.startswith(before):
        return whole[len(before) :]
    # A character's bytes are parted; each side shows a replacement character.
    return tokenizer.decode(
        ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _special_ids(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _parted(text: str) -> str:
    return _MARK.sub(r"\\", text)


def _visible(text: str) -> str:
    """Escape what a terminal would obey instead of show."""
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def _is_shown(letter: str) -> bool:
    if letter in "\n\t":
        return True
    return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and (
        letter not in _BIDIRECTIONAL
    )

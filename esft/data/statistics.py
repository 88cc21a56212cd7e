"""What a task set is like: how many rows and tokens, how long, what is learnt, what is twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from esft.data.example import Example
from esft.data.fitting import Fitted
from esft.data.packing import TrainSet

_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)


class Bin(NamedTuple):
    """Rows of `shortest` to `longest` tokens, both included."""

    shortest: int
    longest: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """How long rows are, in tokens.

    Attributes:
        shortest: row.
        longest: row.
        mean: over rows.
        percentiles: the length that so many percent of the rows do not exceed, without
            interpolation (nearest rank).
        bins: from the shortest row's to the longest's; each ends at a power of two, or where rows
            are cut.
    """

    shortest: int
    longest: int
    mean: float
    percentiles: dict[str, int]
    bins: list[Bin]


@dataclass(frozen=True)
class SetStatistics:
    """Figures of a train set, and of the test rows beside it.

    Attributes:
        rows_encoded: rows before any was left out or cut.
        lengths: of these.
        max_length: tokens a block or row has at most.
        too_long: rows that were longer.
        truncation: what was done to these, see `Fitted.to_dict`.
        duplicates: rows that repeat an earlier one, tokens and what is learnt of them.
        rows: in the train set.
        tokens: of these; padding does not count.
        supervised: how many of them have a label.
        weighted: whether labels have weights.
        blocks: that the rows are packed into; None if they are not.
        fill: share of the blocks' places that hold a token; None likewise.
        eval_rows: test rows.
        eval_supervised: answer tokens of these.
        overlap: test rows that are training rows, too, token for token.
    """

    rows_encoded: int
    lengths: Lengths
    max_length: int
    too_long: int
    truncation: dict[str, Any]
    duplicates: int
    rows: int
    tokens: int
    supervised: int
    weighted: bool
    blocks: int | None
    fill: float | None
    eval_rows: int
    eval_supervised: int
    overlap: int

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        found = asdict(self)
        found["lengths"]["bins"] = [bin._asdict() for bin in self.lengths.bins]
        return found


def measure(
    examples: Sequence[Example],
    fitted: Fitted,
    train_set: TrainSet,
    max_length: int,
    test: Sequence[Example] = (),
) -> SetStatistics:
    """Count and measure a task set.

    Args:
        examples: the training rows as encoded; at least one.
        fitted: what `fit` made of them.
        train_set: what `pack` or `separate` made of that.
        max_length: that they were fitted to.
        test: the test rows.
    """
    lengths = [len(example.input_ids) for example in examples]
    seen = {_digest(example.input_ids) for example in examples}
    return SetStatistics(
        rows_encoded=len(examples),
        lengths=measure_lengths(lengths, max_length),
        max_length=max_length,
        too_long=sum(length > max_length for length in lengths),
        truncation=fitted.to_dict(),
        duplicates=len(examples) - len({_digest(e.input_ids, e.completion) for e in examples}),
        rows=train_set.rows,
        tokens=train_set.tokens,
        supervised=train_set.supervised,
        weighted=train_set.weighted,
        blocks=len(train_set) if train_set.packed else None,
        fill=train_set.tokens / sum(train_set.lengths) if train_set.packed else None,
        eval_rows=len(test),
        eval_supervised=sum(example.supervised for example in test),
        overlap=sum(_digest(example.input_ids) in seen for example in test),
    )


def measure_lengths(lengths: Sequence[int], max_length: int) -> Lengths:
    """Describe lengths, at least one of them; a bin ends at `max_length`."""
    found = np.sort(np.asarray(lengths, dtype=np.int64))
    ranks = np.quantile(found, [p / 100 for p in _PERCENTILES], method="inverted_cdf")
    return Lengths(
        shortest=int(found[0]),
        longest=int(found[-1]),
        mean=float(found.mean()),
        percentiles={f"p{p}": int(length) for p, length in zip(_PERCENTILES, ranks, strict=True)},
        bins=_bins(found, max_length),
    )


def _bins(lengths: Any, max_length: int) -> list[Bin]:
    ends = sorted({*(2**k for k in range(int(lengths[-1]).bit_length() + 1)), max_length})
    counts = np.searchsorted(lengths, ends, side="right")
    bins = [
        Bin(before + 1, end, int(count - count_before))
        for before, end, count_before, count in zip(
            [0, *ends[:-1]], ends, [0, *counts[:-1]], counts, strict=True
        )
    ]
    filled = [place for place, bin in enumerate(bins) if bin.rows]
    return bins[filled[0] : filled[-1] + 1]


def _digest(*sequences: Sequence[int]) -> bytes:
    """Return what tells sequences apart; a set of these is smaller than one of the sequences."""
    digest = hashlib.sha256()
    for values in sequences:
        digest.update(np.asarray(values, dtype=np.int64).tobytes())
    return digest.digest()

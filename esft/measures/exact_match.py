"""Exact match: whether greedy decoding would write the reference, token for token."""

from __future__ import annotations

from collections.abc import Sequence

from esft.evaluation import RowScore
from esft.measures.metric import Scores


def score(rows: Sequence[RowScore]) -> Scores:
    """Return 1 for each row that matches; the figure is their share. Nothing is decoded for it."""
    return Scores([float(row.matched) for row in rows])

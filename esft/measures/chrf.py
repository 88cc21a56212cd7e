"""chrF: F score of character n-grams (Popović, 2015), through sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

from esft.measures.metric import Answer, Scores
from esft.measures.sacrebleu_scores import corpus_scores


def score(answers: Sequence[Answer]) -> Scores:
    """Return sacrebleu's chrF2 of each row, and of all as one corpus, as fractions of 1."""
    from sacrebleu.metrics import CHRF

    return corpus_scores(answers, CHRF(), CHRF())

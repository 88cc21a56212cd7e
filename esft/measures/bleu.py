"""BLEU (Papineni et al., 2002), through sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

from esft.measures.metric import Answer, Scores
from esft.measures.sacrebleu_scores import corpus_scores


def score(answers: Sequence[Answer]) -> Scores:
    """Return sacrebleu's BLEU of all answers as one corpus, as a fraction of 1.

    The figure is the corpus's, which is no mean over rows. A row's own score is BLEU of a sentence,
    whose n-grams are as long as the sentence allows (`effective_order`).
    """
    from sacrebleu.metrics import BLEU

    return corpus_scores(answers, BLEU(), BLEU(effective_order=True))

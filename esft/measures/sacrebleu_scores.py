"""What BLEU and chrF share: a corpus's figure from sums over its rows, by sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esft.measures.metric import Answer, Scores


def corpus_scores(answers: Sequence[Answer], corpus: Any, sentence: Any) -> Scores:
    """Score answers with sacrebleu, 0 to 1.

    Args:
        answers: each with its one reference; white space at the ends does not count.
        corpus: sacrebleu's metric, for the set's figure. What it counts in a row is summed over the
            rows, so that each draw of the bootstrap gives the figure of that corpus.
        sentence: sacrebleu's metric, for a row's own score.
    """
    texts = [answer.text.strip() for answer in answers]
    references = [answer.reference.strip() for answer in answers]
    sums = np.array(corpus._extract_corpus_statistics(texts, [references]), dtype=np.float64)

    def figure(sums: NDArray[np.float64]) -> float:
        counts = [round(value) for value in sums.tolist()]
        return float(corpus._compute_score_from_stats(counts).score) / 100

    rows = [
        float(sentence.sentence_score(text, [reference]).score) / 100
        for text, reference in zip(texts, references, strict=True)
    ]
    return Scores(rows, sums, figure)

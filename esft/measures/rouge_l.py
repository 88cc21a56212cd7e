"""ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004), through rouge-score."""

from __future__ import annotations

from collections.abc import Sequence

from esft.measures.metric import Answer, Scores


def score(answers: Sequence[Answer]) -> Scores:
    """Return each answer's ROUGE-L, without stemming; the figure is their mean.

    rouge-score's words are of the letters a to z and digits, lower case: other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return Scores(
        [
            float(scorer.score(answer.reference, answer.text)["rougeL"].fmeasure)
            for answer in answers
        ]
    )

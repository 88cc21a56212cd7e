"""One row in tokens, and what of it is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossOn = Literal["completion", "assistant", "all"]

IGNORED = -100  # the label that torch's cross entropy and transformers' losses skip


@dataclass(frozen=True, slots=True)
class Example:
    """One row in tokens.

    Attributes:
        input_ids: the whole row, S token ids.
        completion: S flags: True where the token belongs to an answer, its end token included.
        where: `file:line` of the row.
        weights: S factors of the tokens' losses, 0 where a token must not be learnt; None where
            every one is 1.
    """

    input_ids: list[int]
    completion: list[bool]
    where: str
    weights: list[float] | None = None

    @property
    def supervised(self) -> int:
        """How many answer tokens a model is asked to predict; nothing predicts the first token."""
        return sum(self.completion[1:])

    def labels(self, loss_on: LossOn = "completion") -> list[int]:
        """Return S labels: each token's id at its own place, `IGNORED` where it is not learnt.

        Args:
            loss_on: `all` labels every token that has a weight; else answers are labelled, which
                ones was decided when the row was encoded.
        """
        labels = [
            token if loss_on == "all" or answer else IGNORED
            for token, answer in zip(self.input_ids, self.completion, strict=True)
        ]
        if self.weights is not None:
            labels = [
                label if weight else IGNORED
                for label, weight in zip(labels, self.weights, strict=True)
            ]
        # Nothing before it predicts a document's first token; in a packed block, that would be the
        # last token of the document before.
        if labels:
            labels[0] = IGNORED
        return labels

    def without(self, start: int, stop: int) -> Example:
        """Return the example less the tokens from `start` up to `stop`, counted as slices do."""
        weights = self.weights
        return Example(
            self.input_ids[:start] + self.input_ids[stop:],
            self.completion[:start] + self.completion[stop:],
            self.where,
            None if weights is None else weights[:start] + weights[stop:],
        )

    def part(self, start: int, stop: int) -> Example:
        """Return the tokens from `start` up to `stop`, as slices take them."""
        weights = self.weights
        return Example(
            self.input_ids[start:stop],
            self.completion[start:stop],
            self.where,
            None if weights is None else weights[start:stop],
        )

"""The rows that a run scores its model on: how many at once, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esft.data.batching import batches
from esft.data.example import Example
from esft.measures.metric import needs_text
from esft.recipe_sections import Recipe
from esft.run.task_data import TaskData

TOKENS = 4096  # at once, padding included: the default of `esft.evaluation.score_rows`


@dataclass(frozen=True)
class Scored:
    """The heaviest batch that is scored.

    Attributes:
        rows: B.
        length: S, padding included.
        kept: places of the S where logits are computed: those that predict a token of an answer.
        asked: rows and tokens, answers included, of what the model is asked to write; None where
            no metric needs that.
    """

    rows: int
    length: int
    kept: int
    asked: tuple[int, int] | None


def plan_scored(recipe: Recipe, task: TaskData | None) -> Scored | None:
    """Say what a run scores at once; None if it scores nothing.

    Args:
        recipe: of the run.
        task: its rows; where they are not known, or lack what is scored, every row is taken to be
            as long as the longest that trains, all of it an answer.
    """
    data, evaluation = recipe.data, recipe.evaluation
    if not (data.eval or data.test or data.eval_rows or evaluation.general):
        return None
    writes = bool(data.eval or data.test or data.eval_rows) and any(
        map(needs_text, evaluation.metrics)
    )
    sets = [] if task is None else [task.eval.examples, task.test.examples, *task.general.values()]
    heaviest = max(
        (group for examples in sets for group in _groups(examples)),
        key=lambda group: group[0] * group[2],
        default=_full(data.max_length),
    )
    answered = data.max_length + evaluation.max_new_tokens
    asked = (max(1, TOKENS // answered), answered) if writes else None
    return Scored(*heaviest, asked)


def _groups(examples: Sequence[Example]) -> list[tuple[int, int, int]]:
    """Return rows, length and kept places of each batch that `esft.evaluation` makes."""
    found = []
    for rows in batches([len(example.input_ids) for example in examples], TOKENS):
        batch = [examples[row] for row in rows]
        kept = {
            place
            for example in batch
            for place, answers in enumerate(example.completion)
            if answers and place
        }
        found.append((len(batch), len(batch[0].input_ids), len(kept)))
    return found


def _full(length: int) -> tuple[int, int, int]:
    return max(1, TOKENS // length), length, length

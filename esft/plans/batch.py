"""The batches that a run will draw: how many rows and tokens, and how many of these have labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.data.example import IGNORED
from esft.data.packing import TrainSet
from esft.errors import EsftError
from esft.loading import load_tokenizer
from esft.plans.scored import Scored, plan_scored
from esft.recipe_sections import Recipe
from esft.run.task_data import TaskData, prepare

_DEFAULT_ROWS = 8  # transformers' per_device_train_batch_size
_DEFAULT_EPOCHS = 3
_READ_AT_MOST = 64_000_000  # bytes of training rows: a plan should not take longer than a look


@dataclass(frozen=True)
class Batch:
    """The heaviest batch of a run.

    Attributes:
        rows: B, rows or packed blocks that go through the model at once.
        length: S, tokens of each, padding included.
        labelled: tokens with a label: those that logits are computed for.
        accumulated: batches of one optimizer step.
        packed: whether a row is a block of several examples.
        steps: optimizer steps of the run; None where the rows are not known.
        measured: whether this is what the rows say; else what is the most that could be.
        words: where it comes from.
        scored: what is scored while the run trains, and once it has; None for nothing.
    """

    rows: int
    length: int
    labelled: int
    accumulated: int
    packed: bool
    steps: int | None
    measured: bool
    words: str
    scored: Scored | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step, padding included."""
        return self.rows * self.length * self.accumulated

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"tokens": self.tokens}


def plan_batch(recipe: Recipe, folder: Path) -> Batch:
    """Read the recipe's training rows, where they are at hand, and say what batches they make.

    Args:
        recipe: of the run.
        folder: of the model; its tokenizer counts the tokens.
    """
    training = recipe.training
    rows = training.get("per_device_train_batch_size") or _DEFAULT_ROWS
    accumulated = training.get("gradient_accumulation_steps") or 1
    steps = training.get("max_steps", -1)
    task, why = _task_data(recipe, folder)
    scored = plan_scored(recipe, task)
    if task is None:
        length = recipe.data.max_length
        return Batch(
            rows=rows,
            length=length,
            labelled=rows * length,
            accumulated=accumulated,
            packed=recipe.data.packing,
            steps=steps if steps > 0 else None,
            measured=False,
            words=f"assumed: every row full, every token with a label ({why})",
            scored=scored,
        )
    found = task.train_set
    labelled = sorted((_labelled(found, item) for item in range(len(found))), reverse=True)
    if steps <= 0:
        epochs = training.get("num_train_epochs", _DEFAULT_EPOCHS)
        batches = -(-len(found) // rows)
        steps = max(1, round(max(1, -(-batches // accumulated)) * epochs))
    return Batch(
        rows=min(rows, len(found)),
        length=max(found.lengths),
        labelled=sum(labelled[:rows]),
        accumulated=accumulated,
        packed=found.packed,
        steps=steps,
        measured=True,
        words=f"the heaviest of {len(found):,} {'blocks' if found.packed else 'rows'}",
        scored=scored,
    )


def _task_data(recipe: Recipe, folder: Path) -> tuple[TaskData | None, str]:
    """Return a run's rows in tokens, or why they are not looked at."""
    sources = [Path(source.path) for source in recipe.data.sources("train")]
    absent = next((path for path in sources if not path.is_file()), None)
    if absent is not None:
        return None, f"{absent} is no file here"
    if sum(path.stat().st_size for path in sources) > _READ_AT_MOST:
        return None, f"the rows have more than {_READ_AT_MOST // 10**6} MB"
    try:
        tokenizer = load_tokenizer(folder)
        try:
            return prepare(recipe.data, tokenizer, evaluation=recipe.evaluation), ""
        except EsftError:  # what is scored may not be here
            data = recipe.data.model_copy(update={"eval": None, "test": None})
            return prepare(data, tokenizer), ""
    except EsftError as error:
        return None, str(error).splitlines()[0]


def _labelled(found: TrainSet, item: int) -> int:
    # The first token of a row has none before it that could predict it.
    return sum(label != IGNORED for label in found[item]["labels"][1:])

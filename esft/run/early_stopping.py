"""When a run stops because its test metric no longer gets better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esft.recipe_sections import EarlyStoppingSpec
from esft.run.fields import full_name


def without_gain(values: Sequence[float], *, greater_is_better: bool, threshold: float) -> int:
    """Count the evaluations since the last that was better than all before it.

    As transformers' `EarlyStoppingCallback` counts: better by more than `threshold`, but what was
    the best so far is the best of all values, gains below the threshold included.

    Args:
        values: of the metric, in the order of the evaluations.
        greater_is_better: or less is.
        threshold: how much better counts.
    """
    signed = [value if greater_is_better else -value for value in values]
    count = 0
    for number, value in enumerate(signed):
        gained = number == 0 or value - max(signed[:number]) > threshold
        count = 0 if gained else count + 1
    return count


class EarlyStopping(TrainerCallback):
    """Stops a run after `patience` evaluations in a row without a gain.

    It keeps no count: what was logged tells, so that a resumed run stops where one that was not
    interrupted does.

    Args:
        spec: the recipe's `early_stopping`.
    """

    def __init__(self, spec: EarlyStoppingSpec) -> None:
        self._spec = spec

    def due(self, args: TrainingArguments, history: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether a run that logged `history` (`TrainerState.log_history`) has to stop."""
        assert args.metric_for_best_model is not None  # set by `training_fields.with_defaults`
        name = full_name(args.metric_for_best_model)
        values = [entry[name] for entry in history if name in entry]
        count = without_gain(
            values,
            greater_is_better=bool(args.greater_is_better),
            threshold=self._spec.threshold,
        )
        return count >= self._spec.patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop, or not; the evaluation was logged."""
        control.should_training_stop |= self.due(args, state.log_history)

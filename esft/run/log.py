"""What a training run tells while it runs: lines in `metrics.jsonl`, and progress on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esft.files import append_line
from esft.progress import Reporter, Task


class CountsTokens(Protocol):
    """A trainer that counts what it trains on."""

    tokens_seen: int


class Metrics(TrainerCallback):
    """Writes everything logged to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write a line."""
        logs = logs or {}
        append_line(self._path, log_line({**logs, "step": state.global_step}).rstrip())


class Progress(TrainerCallback):
    """Shows steps, loss, tokens/s, peak memory and time left."""

    def __init__(self, trainer: CountsTokens, reporter: Reporter) -> None:
        self._trainer, self._reporter = trainer, reporter
        self._task = Task()
        self._figures: dict[str, float] = {}
        self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the task."""
        self._task = self._reporter.task("training", total=state.max_steps, unit="step")
        if state.global_step:
            self._task.advance(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Remember what is shown beside the bar."""
        logs = logs or {}
        shown = {"loss": "loss", "eval_loss": "eval loss", "eval_exact_match": "exact match"}
        self._figures |= {shown[name]: logs[name] for name in shown if name in logs}
        self._figures["peak GB"] = logs["peak_memory"] / 1e9

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step."""
        tokens, self._tokens = self._trainer.tokens_seen - self._tokens, self._trainer.tokens_seen
        self._task.advance(1, tokens=tokens, **self._figures)

    def close(self) -> None:
        """End what is shown, however training ended."""
        self._task.close()


def log_line(logs: dict[str, float]) -> str:
    """Return what was logged as a line of `metrics.jsonl`, its step first."""
    return json.dumps({"step": logs["step"], **logs}) + "\n"

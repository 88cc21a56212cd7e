"""How long a run has taken: in all, and with training alone."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STEPS = 1000  # whose times are kept


class Clock(TrainerCallback):
    """Counts a run's seconds, those of its earlier parts included, and the time of its steps.

    What passes inside `paused` is not of training.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._paused = 0.0
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._step_began = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    @property
    def train_seconds(self) -> float:
        """Seconds of training: without those that passed while the clock was paused."""
        return self.seconds - self._paused

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step, in seconds, of the last thousand; None if there was none."""
        return statistics.median(self._steps) if self._steps else None

    def start(self, state: Mapping[str, Any] | None = None) -> None:
        """Start, or go on from where `state` was taken."""
        state = state or {"seconds": 0.0, "paused": 0.0, "steps": []}
        self._began = time.monotonic() - state["seconds"]
        self._paused = state["paused"]
        self._steps = deque(state["steps"], maxlen=_STEPS)
        self._step_began = self.train_seconds

    def state(self) -> dict[str, Any]:
        """Return what is known, JSON-ready, for `start`."""
        return {"seconds": self.seconds, "paused": self._paused, "steps": list(self._steps)}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what passes inside the block as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the first step: what came before it was preparation."""
        self._step_began = self.train_seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note how long the step took, its batch included, and all that was done since the last."""
        now = self.train_seconds
        self._steps.append(round(now - self._step_began, 6))
        self._step_began = now

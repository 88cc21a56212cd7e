"""What a training run did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.evaluation import Evaluation


@dataclass(frozen=True)
class RunResult:
    """What a run did; sizes in parameters and bytes, times in seconds.

    Attributes:
        out: the run's folder.
        delta: the folder in it that holds what training changed.
        method: `esft`, `random`, `lora` or `full`.
        steps: optimizer steps done, earlier parts of a resumed run included.
        seconds: of training, in this process.
        tokens_per_second: tokens trained on, padding included where rows are packed.
        train_loss: mean over the steps of this process; None if none was left to do.
        trained: parameters that train.
        total: parameters of the model.
        routed: parameters in routed experts.
        delta_bytes: size of the delta's weights on disk.
        peak_memory: of the device, or of the process on a CPU.
        evaluation: the trained model on `data.eval`, if given.
    """

    out: Path
    delta: Path
    method: str
    steps: int
    seconds: float
    tokens_per_second: float
    train_loss: float | None
    trained: int
    total: int
    routed: int
    delta_bytes: int
    peak_memory: int
    evaluation: Evaluation | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        found = {**vars(self), "out": str(self.out), "delta": str(self.delta)}
        found["evaluation"] = None if self.evaluation is None else self.evaluation.to_dict()
        return found

"""What a training run did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.evaluation import Evaluation
from esft.measures.task import TaskScores
from esft.run.drift import Drift
from esft.run.movement import Moved


@dataclass(frozen=True)
class RunResult:
    """What a run did; sizes in parameters and bytes, times in seconds.

    Attributes:
        out: the run's folder.
        delta: the folder in it that holds what training changed.
        method: `esft`, `random`, `lora`, `hot-lora` or `full`.
        steps: optimizer steps done, earlier parts of a resumed run included.
        best_step: the step whose weights the delta has, if it is the best one's and not the last.
        seconds: of training, evaluations not counted, earlier parts of a resumed run included.
        step_seconds: median over the last thousand steps, evaluations not counted; None if this
            process, and those before it, noted none.
        tokens_per_second: tokens trained on, padding included where rows are packed.
        train_loss: mean over the steps of this process; None if none was left to do.
        trained: parameters that train.
        total: parameters of the model.
        routed: parameters in routed experts.
        moved: how many of the trained parameters are others than before; None if most of the
            model trained, which would have to be copied to know.
        stored_moved: how many of the delta's numbers are others than the base's, as both store
            them; None for LoRA, whose delta has no tensor of the base.
        drift: how the selected experts' gate scores changed; None if that was not measured.
        delta_bytes: size of the delta's weights on disk.
        peak_memory: of the device, or of the process on a CPU.
        flops: floating-point operations of training by formula, see `esft.run.flops`; earlier
            parts of a resumed run included.
        evaluation: the trained model on `data.eval`, if given.
        test: the trained model on `data.test`, if given.
        general: the trained model's loss on each other domain, in nats a token, if any is given.
        adapter: of LoRA, `r`, `alpha` and `bytes` (of the factors, without the file's header);
            and `esft_bytes`, of the delta that the rank was matched to, if it was.
    """

    out: Path
    delta: Path
    method: str
    steps: int
    best_step: int | None
    seconds: float
    step_seconds: float | None
    tokens_per_second: float
    train_loss: float | None
    trained: int
    total: int
    routed: int
    moved: Moved | None
    stored_moved: Moved | None
    drift: Drift | None
    delta_bytes: int
    peak_memory: int
    flops: float
    evaluation: Evaluation | None
    test: TaskScores | None = None
    general: dict[str, float] | None = None
    adapter: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        found = {**vars(self), "out": str(self.out), "delta": str(self.delta)}
        for name in ("moved", "stored_moved", "drift", "evaluation", "test"):
            part = getattr(self, name)
            found[name] = None if part is None else part.to_dict()
        return found

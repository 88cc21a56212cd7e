"""transformers' training loop with esft's own checkpoints, evaluation, metrics and progress."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from esft import checkpoint
from esft.data.numbered import ITEMS, Numbered
from esft.data.packing import TrainSet
from esft.divergence import FiniteSteps, diverged
from esft.errors import EsftError
from esft.evaluation import evaluate_model
from esft.files import write_text
from esft.labelled import labelled_logits
from esft.memory import peak_memory
from esft.moe import trainable_parameters
from esft.progress import SILENT, Reporter
from esft.training_log import Metrics, Progress, log_line

KEPT_CHECKPOINTS = 2  # unless save_total_limit says otherwise


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
        steps: optimizer steps done, those before a resumption included.
        loss: mean over the steps of this process; None if there was none left to do.
    """

    steps: int
    loss: float | None


class EsftTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints hold what trains, and resume to the same bits.

    Args:
        checkpoints: folder for checkpoints.
        guard: what must not change between a run and its resumption, see `checkpoint.check`.
        metrics: file that gets one JSON line for everything logged.
        diverged: file that is written if the loss or the gradient is not finite.
        train_set: what to learn from.
        collate: makes a batch of its items.
        reporter: shown the progress.
        options: as for `Trainer`; `eval_dataset` are examples.
    """

    def __init__(
        self,
        *,
        checkpoints: Path,
        guard: dict[str, Any],
        metrics: Path,
        diverged: Path,
        train_set: TrainSet,
        collate: Callable[..., dict[str, Any]],
        reporter: Reporter = SILENT,
        **options: Any,
    ) -> None:
        numbered = Numbered(train_set, collate)
        super().__init__(train_dataset=numbered, data_collator=numbered.collate, **options)
        self.control: TrainerControl
        self.checkpoints, self.guard = checkpoints, guard
        self.metrics = metrics
        self.tokens_seen = 0
        self._finite = FiniteSteps(train_set.where, diverged)
        self._began = time.monotonic()
        self._progress = Progress(self, reporter)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(Metrics(metrics))
        self.add_callback(self._progress)

    def run(self, saved: checkpoint.SavedState | None = None) -> Trained:
        """Train, from the start or from a checkpoint on, which `checkpoint.check` has passed.

        Raises:
            EsftError: training diverged, or no step was taken.
            OutputError: the disk is full.
        """
        self._began = time.monotonic()
        try:
            if saved is None:
                return self._trained(self.train())
            state = TrainerState.load_from_json(str(saved.folder / checkpoint.TRAINER))
            # Steps after the checkpoint are logged again.
            write_text(self.metrics, "".join(log_line(logs) for logs in state.log_history))
            if state.log_history:
                self._began -= state.log_history[-1]["seconds"]
            if state.global_step >= state.max_steps:
                # Killed after its last step; transformers would do one more.
                checkpoint.restore_parameters(saved, self.model)
                return Trained(state.global_step, None)
            return self._trained(self.train(resume_from_checkpoint=str(saved.folder)))
        finally:
            self._progress.close()

    def _trained(self, outcome: Any) -> Trained:
        if not outcome.global_step:
            raise EsftError("training: no step was taken; are there fewer rows than a batch?")
        return Trained(outcome.global_step, outcome.training_loss)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """Run one forward and backward pass; count its tokens and keep its loss for the check."""
        self._finite.check()
        items = inputs.pop(ITEMS)
        # Counted on the host: to count a mask on a GPU would be to wait for it.
        tokens = sum(len(self.train_dataset[item]["input_ids"]) for item in items)
        self.tokens_seen += tokens
        self.state.num_input_tokens_seen += tokens
        loss = super().training_step(model, inputs, *args, **options)
        self._finite.add(loss, items)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's hook before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.before_step(
            self.state.global_step + 1,
            norm,
            self.optimizer.optimizer,
            scaled=self.accelerator.scaler is not None,
        )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, and beside them tokens, seconds and memory so far."""
        self._finite.check()
        so_far = {
            "tokens": self.state.num_input_tokens_seen,
            "seconds": round(time.monotonic() - self._began, 3),
            "peak_memory": peak_memory(self.args.device),
        }
        super().log({**logs, **so_far}, start_time)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """Return the loss, with logits for labelled tokens only."""
        # Label smoothing computes its own loss from all logits.
        if self.label_smoother is not None or not self.model_accepts_loss_kwargs:
            return super().compute_loss(model, inputs, return_outputs, **options)
        with labelled_logits(self.model, inputs) as batch:
            return super().compute_loss(model, batch, return_outputs, **options)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Score the model on the test rows and log the result."""
        self._finite.check()
        found = evaluate_model(self.model, self.eval_dataset)
        metrics = {
            "eval_loss": found.loss,
            "eval_exact_match": found.exact_match,
            "eval_perplexity": found.perplexity,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # Trainer's hooks for checkpoints, all replaced: the stock ones pickle, and restore the
    # initial weights of fused experts.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.check()
        # Or it would in time replace the last checkpoint that is worth resuming from.
        for name, parameter in trainable_parameters(self.model).items():
            if not parameter.isfinite().all():
                raise diverged(self.state.global_step, f"{name} has NaN or infinite values")
        checkpoint.save(
            self.checkpoints,
            step=self.state.global_step,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer=dataclasses.asdict(self.state),
            guard=self.guard,
        )
        checkpoint.prune(self.checkpoints, self.args.save_total_limit or KEPT_CHECKPOINTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.restore_parameters(_at(resume_from_checkpoint), model or self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.restore_optimizer(_at(checkpoint_path), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.restore_random(_at(checkpoint_path))

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        """No gradient scaler is used: fp16 is not trained."""


def _at(folder: str) -> checkpoint.SavedState:
    return checkpoint.SavedState(Path(folder))

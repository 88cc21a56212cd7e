"""transformers' training loop with esft's own checkpoints, evaluation, metrics and progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from esft import processes
from esft.data.evened import Evened
from esft.data.numbered import ITEMS, Numbered
from esft.data.packing import TrainSet
from esft.errors import EsftError, ModelError, RecipeError
from esft.files import write_text
from esft.moe import trainable_parameters
from esft.progress import SILENT, Reporter
from esft.recipe_sections import CheckpointSpec, EarlyStoppingSpec
from esft.routers.losses import RouterLosses
from esft.run.checkpoint import SavedState, best
from esft.run.checkpointing import Checkpoints, stopped_early
from esft.run.clock import Clock
from esft.run.divergence import FiniteSteps, diverged
from esft.run.early_stopping import EarlyStopping
from esft.run.interruption import Interruption
from esft.run.labelled import labelled_logits, total_weight
from esft.run.log import Metrics, Progress, log_line
from esft.run.memory import peak_memory
from esft.run.processes import once
from esft.run.sharding import finite, shard_on_cpu, whole


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
        steps: optimizer steps done, those before a resumption included.
        loss: mean over all of them.
        best: the step whose weights the model has, if it is not the last.
    """

    steps: int
    loss: float
    best: int | None = None


class EsftTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints hold what trains, and resume to the same bits.

    Args:
        checkpoints: folder for checkpoints.
        spec: which of them are kept.
        guard: what must not change between a run and its resumption, see `esft.run.guard`.
        environment: what may, and is noted.
        interruption: ends the run after a step.
        metrics: file that gets one JSON line for everything logged.
        diverged: file that is written if the loss or the gradient is not finite.
        losses: of routers, added to the task's.
        early_stopping: when to stop before the last step.
        score: scores the model by the names that an evaluation logs.
        train_set: what to learn from.
        collate: makes a batch of its items.
        reporter: shown the progress.
        options: as for `Trainer`; of `eval_dataset` only its presence counts.

    Attributes:
        clock: the time that training took, without evaluations.
        tokens_seen: tokens trained on since this program began, by all its processes.
    """

    def __init__(
        self,
        *,
        checkpoints: Path,
        spec: CheckpointSpec,
        guard: dict[str, Any],
        environment: dict[str, Any],
        interruption: Interruption,
        metrics: Path,
        diverged: Path,
        losses: RouterLosses | None = None,
        early_stopping: EarlyStoppingSpec | None = None,
        score: Callable[[Any], dict[str, float]],
        train_set: TrainSet,
        collate: Callable[..., dict[str, Any]],
        reporter: Reporter = SILENT,
        **options: Any,
    ) -> None:
        if train_set.weighted and options["args"].label_smoothing_factor:
            raise RecipeError(
                "training.label_smoothing_factor: smooths the labels of all tokens alike, but rows "
                "of data.train have weights; leave one of them out"
            )
        numbered = Numbered(train_set, collate)
        super().__init__(train_dataset=numbered, data_collator=numbered.collate, **options)
        self.control: TrainerControl
        if processes.count() > 1 and not self.model_accepts_loss_kwargs:
            raise ModelError(
                "this family computes its loss in a way of its own, which cannot be divided by the "
                "supervised tokens of several processes; train it in one"
            )
        self.saving = Checkpoints(
            self,
            checkpoints,
            spec=spec,
            guard=guard,
            environment=environment,
            interruption=interruption,
        )
        self.interruption = interruption
        self.checkpoints, self.metrics = checkpoints, metrics
        self.tokens_seen = 0
        self._step_tokens = 0  # of the step under way, in this process
        self._learns = True  # whether the batch under way has rows
        self._step_batches = 1.0  # of the step under way, on average over processes
        self._finite = FiniteSteps(train_set.where, diverged)
        self._score = score
        self.clock = Clock()
        self._progress = Progress(self, reporter)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        if processes.is_main():
            self.add_callback(Metrics(metrics))
        self.add_callback(self._progress)
        self.add_callback(self.clock)
        self.losses = losses
        if losses is not None:
            self.add_callback(losses)
            self.saving.buffers = losses.tensors()
        if early_stopping is not None:
            self.add_callback(EarlyStopping(early_stopping))
        self.add_callback(self.saving)

    def run(self, saved: SavedState | None = None) -> Trained:
        """Train, from the start or from a checkpoint on, which `guard.check_same` has passed.

        With `load_best_model_at_end` the model ends with the weights of its best checkpoint.

        Raises:
            EsftError: training diverged, or no step was taken.
            OutputError: the disk is full.
            Interrupted: a signal came; a checkpoint of the last step is there.
        """
        self.clock.start()
        trained = self._run(saved)
        if not self.args.load_best_model_at_end:
            return trained
        metric, greater = self.args.metric_for_best_model, bool(self.args.greater_is_better)
        found = best(self.checkpoints, metric, greater=greater)
        if found is None:
            raise EsftError("training.load_best_model_at_end: no step was both scored and saved")
        self.saving.restore_weights(found)
        return trained._replace(best=found.step)

    def _run(self, saved: SavedState | None) -> Trained:
        try:
            if saved is None:
                return self._train()
            state = self.saving.start_from(saved)
            # Steps after the checkpoint are logged again.
            if processes.is_main():
                write_text(self.metrics, "".join(log_line(logs) for logs in state.log_history))
            if state.global_step >= state.max_steps or stopped_early(state):
                # Killed after its last step; transformers would do one more.
                self.state = state
                self.saving.restore_weights(saved)
                loop = saved.read("loop")
                loss = (loop["loss_sum"] + loop["loss"].item()) / state.global_step
                return Trained(state.global_step, loss)
            # The run that goes on has been scored at its start.
            self.args.eval_on_start = False
            return self._train(resume_from_checkpoint=str(saved.folder))
        finally:
            self._progress.close()

    def _train(self, **options: Any) -> Trained:
        with self.interruption.at_a_good_moment():
            steps = self.train(**options).global_step
            if not steps:
                raise EsftError("training: no step was taken; are there fewer rows than a batch?")
            self.interruption.agree()
            if self.interruption.signal is not None:
                self.saving.save_once()
        return Trained(steps, self._total_loss_scalar / steps)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's hook: let FSDP be what was asked for."""
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def get_train_dataloader(self) -> Any:
        """Return the loader of this process's batches; together they are those of one process."""
        loader: Any = super().get_train_dataloader()
        if processes.count() > 1 and not self.args.dataloader_drop_last:
            batches = loader.batch_sampler.batch_sampler
            size = batches.batch_size * processes.count()
            batches.sampler = Evened(batches.sampler, len(self.train_dataset), size)
        return loader

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        """Run one forward and backward pass; count its tokens and keep its loss for the check."""
        self._finite.check()
        items = inputs.pop(ITEMS)
        # Counted on the host: to count a mask on a GPU would be to wait for it.
        self._step_tokens += sum(len(self.train_dataset[item]["input_ids"]) for item in items)
        self._learns = bool(items)
        loss = super().training_step(model, inputs, *args, **options)
        self._finite.add(loss, items)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's hook before the optimizer's step."""
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))
        self._count_step()
        self._finite.before_step(
            self.state.global_step + 1,
            norm,
            self.optimizer.optimizer,
            scaled=self.accelerator.scaler is not None,
        )
        return norm

    def _count_step(self) -> None:
        """Count the step's tokens in all processes; they tell each other of signals, too."""
        own = (self._step_tokens, self.interruption.came)
        told = processes.gathered(own, "train") if processes.count() > 1 else [own]
        self.interruption.agree(came for _, came in told)
        tokens, self._step_tokens = sum(tokens for tokens, _ in told), 0
        self.tokens_seen += tokens
        self.state.num_input_tokens_seen += tokens

    def _finalize_training(self, *args: Any, **options: Any) -> Any:
        """Trainer's hook at the end of its loop, where it reads a loss of this process alone."""
        self._tr_loss = self.mean_loss()
        return super()._finalize_training(*args, **options)

    def mean_loss(self) -> Tensor:
        """Return what of the loss is summed up and not logged yet, on average over processes."""
        if processes.count() == 1:
            return self._tr_loss
        losses = processes.gathered(float(self._tr_loss), "train")
        return torch.tensor(sum(losses) / len(losses), device=self._tr_loss.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures, and beside them tokens, seconds and memory so far."""
        self._finite.check()
        so_far = {
            "tokens": self.state.num_input_tokens_seen,
            "seconds": round(self.clock.seconds, 3),
            "train_seconds": round(self.clock.train_seconds, 3),
            "peak_memory": peak_memory(self.args.device),
        }
        if self.losses is not None and "loss" in logs:
            so_far |= self.losses.means()
        if "train_loss" in logs:  # of a resumed run, transformers knows a part only
            so_far["train_loss"] = self._total_loss_scalar / self.state.global_step
        super().log({**logs, **so_far}, start_time)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any
    ) -> Any:
        """Return the task's loss, with the gradient of all losses."""
        if self.losses is None or not torch.is_grad_enabled():
            return self._task_loss(model, inputs, return_outputs, **options)
        with self.losses.watching(inputs, learnt=self._learns) as total:
            found = self._task_loss(model, inputs, return_outputs, **options)
        extra = total()
        # A task's loss that is not divided by all items of a step yet, Trainer divides with this.
        if self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None:
            extra = extra / self._step_batches
        # What is logged and checked as the loss stays the task's: this is 0.
        gradient = extra - extra.detach()
        return (found[0] + gradient, *found[1:]) if return_outputs else found + gradient

    def _task_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool, **options: Any
    ) -> Any:
        """Return the loss, with logits for labelled tokens only, and with their weights."""
        # Label smoothing computes its own loss from all logits.
        if self.label_smoother is not None or not self.model_accepts_loss_kwargs:
            return super().compute_loss(model, inputs, return_outputs, **options)
        with labelled_logits(self.model, inputs) as batch:
            return super().compute_loss(model, batch, return_outputs, **options)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's hook: what the sum of an optimizer step's losses is divided by."""
        self._step_batches = float(len(batch_samples))
        if self.losses is not None and processes.count() > 1:
            # A process that has no rows left adds nothing to what the others' gradients sum up to.
            own = sum(bool(batch[ITEMS]) for batch in batch_samples)
            self._step_batches = sum(processes.gathered(own, "train")) / processes.count()
        if any("loss_weights" in batch for batch in batch_samples):
            total = total_weight(batch_samples).to(device)
            return self.accelerator.gather(total).sum()
        return super()._get_num_items_in_batch(batch_samples, device)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Score the model and log the result; the time it takes is not counted as training."""
        self._finite.check()
        with self.clock.paused():
            # On a GPU processes may differ in last bits, and what follows must be the same for all.
            metrics = processes.gathered(self._score(self.model), "score")[0]
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
        parameters = trainable_parameters(self.model)
        bad = [name for name, parameter in parameters.items() if not finite(parameter)]
        if found := [name for names in processes.gathered(bad, "save") for name in names]:
            raise once(diverged(self.state.global_step, f"{found[0]} has NaN or infinite values"))
        self.saving.save()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.saving.restore_weights(SavedState(Path(resume_from_checkpoint)))

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            self.saving.restore_optimizer()

    def _load_rng_state(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            self.saving.restore_random()

    def _load_scaler(self, checkpoint_path: str | None) -> None:
        """`restore_optimizer` has done it."""

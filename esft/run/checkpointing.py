"""When a training loop is saved, what of it, and how it is put back to the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from esft import processes
from esft.errors import CheckError
from esft.moe import trainable_parameters
from esft.recipe_sections import CheckpointSpec
from esft.run import checkpoint
from esft.run.checkpoint import SavedState
from esft.run.interruption import Interrupted, Interruption
from esft.run.random_state import draw_apart, random_state, restore_random_state
from esft.run.sharding import as_kept, local, reshard, whole


class Cursor(NamedTuple):
    """How far the training set has been drawn: the next batch's number in its epoch, from 0."""

    epoch: int
    batch: int


class Checkpoints(TrainerCallback):
    """A run's checkpoints. The trainer calls its methods in place of the stock hooks.

    Args:
        trainer: the `Trainer` that is saved and restored.
        folder: holds the checkpoints.
        spec: how many to keep.
        guard: see `checkpoint.save`.
        environment: see `checkpoint.save`.
        interruption: looked at after each step; one is answered with a checkpoint.
    """

    def __init__(
        self,
        trainer: Any,
        folder: Path,
        *,
        spec: CheckpointSpec,
        guard: Mapping[str, Any],
        environment: Mapping[str, Any],
        interruption: Interruption,
    ) -> None:
        self._trainer, self._folder, self._spec = trainer, folder, spec
        self._guard, self._environment = guard, environment
        self._interruption = interruption
        # What else training changes, without a gradient; restored in place.
        self.buffers: Mapping[str, Tensor] = {}
        self._resumed: SavedState | None = None
        self._cursor, self._batches = Cursor(0, 0), 0
        self._epoch_random: dict[str, Any] = {}
        self._owed = False
        self._saved_step: int | None = None

    def start_from(self, saved: SavedState) -> TrainerState:
        """Make `train` go on from a checkpoint, and return the loop's state that it holds."""
        self._resumed = saved
        self._saved_step = saved.step
        loop = saved.read("loop")
        self._cursor = Cursor(**loop["cursor"])
        # In batches of this process: a step may have been split into another number of them.
        then = saved.manifest["environment"].get("accumulated")
        if then is not None:
            steps = -(-self._cursor.batch // then)
            now = self._trainer.args.gradient_accumulation_steps
            self._cursor = self._cursor._replace(batch=steps * now)
        self._trainer.clock.start(loop["clock"])
        return TrainerState.load_from_json(str(saved.folder / checkpoint.TRAINER))

    def save(self) -> None:
        """Write a checkpoint of the loop, between two steps, and delete old ones.

        Raises:
            OutputError: the disk is full; earlier checkpoints are as they were.
            Interrupted: a signal asked for it.
        """
        trainer, state = self._trainer, self._trainer.state
        reshard(trainer.model)
        trainer.store_flos()
        scaler = trainer.accelerator.scaler
        for callback in self._stateful():
            state.stateful_callbacks[type(callback).__name__] = callback.state()
        scores = [logs for logs in state.log_history if logs["step"] == state.global_step]
        random = {"now": random_state(), "epoch": self._epoch_random}
        content = {
            "parameter": whole(trainable_parameters(trainer.model)),
            "buffer": self.buffers,
            "optimizer": whole(trainer.optimizer.state_dict()),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": random,
            "loop": {
                "cursor": self._next()._asdict(),
                "loss": trainer.mean_loss(),
                "loss_sum": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "clock": trainer.clock.state(),
            },
        }
        if processes.count() > 1:
            own = {"random": random, "loss": trainer._tr_loss.cpu()}
            content["processes"] = processes.gathered(own, "save")
        # Nobody goes on, or reads it, before it is there.
        with processes.together("save"):
            if processes.is_main():
                self._write(content, scores)
        self._saved_step = state.global_step
        if self._interruption.signal is not None:
            raise Interrupted(self._interruption.signal)

    def _write(self, content: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> None:
        """Write the state of the loop, and delete what need not be kept."""
        trainer, state = self._trainer, self._trainer.state
        saved = checkpoint.save(
            self._folder,
            step=state.global_step,
            state=content,
            trainer=dataclasses.asdict(state),
            guard=self._guard,
            environment=self._environment,
            metrics={k: v for logs in scores for k, v in logs.items() if k.startswith("eval_")},
        )
        checkpoint.prune(
            self._folder,
            saved,
            keep_last=self._spec.keep_last,
            keep_best=self._spec.keep_best,
            metric=trainer.args.metric_for_best_model or "eval_loss",
            greater=bool(trainer.args.greater_is_better),
        )

    def save_once(self) -> None:
        """Write a checkpoint unless there is one of this step."""
        if self._saved_step != self._trainer.state.global_step:
            self.save()

    def restore_weights(self, saved: SavedState) -> None:
        """Load what trains from a checkpoint into the trainer's model, in place.

        Raises:
            CheckError: the model does not train what was saved, or gets something else.
        """
        reshard(self._trainer.model)
        load_tensors(trainable_parameters(self._trainer.model), saved, "parameter")
        load_tensors(self.buffers, saved, "buffer")

    def restore_optimizer(self) -> None:
        """Put back the optimizer, the learning-rate schedule and the gradient scaler.

        Raises:
            CheckError: one of them is not what was saved.
        """
        assert self._resumed is not None
        trainer, saved = self._trainer, self._resumed
        load_optimizer(trainer.optimizer, saved.read("optimizer"))
        saved.verify("optimizer", whole(trainer.optimizer.state_dict()))
        trainer.lr_scheduler.load_state_dict(saved.read("scheduler"))
        saved.verify("scheduler", trainer.lr_scheduler.state_dict())
        scaler = saved.read("scaler")
        if scaler is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler.load_state_dict(scaler)
            saved.verify("scaler", trainer.accelerator.scaler.state_dict())

    def restore_random(self) -> None:
        """Put the random generators back to where they were when the checkpoint was written."""
        if (random := self._random()) is not None:
            restore_random_state(random["now"])

    # The loop's events, after those that transformers answers by itself.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put back what the loop has summed up, and the generators an epoch's order comes from."""
        if self._resumed is None:
            draw_apart(args.seed, processes.rank())
            return
        loop, own = self._resumed.read("loop"), self._own()
        self._trainer._tr_loss = (own or loop)["loss"].to(args.device)
        self._trainer._total_loss_scalar = loop["loss_sum"]
        self._trainer._globalstep_last_logged = loop["last_logged"]
        for callback in self._stateful():
            name = type(callback).__name__
            for key, value in state.stateful_callbacks.get(name, {}).get("attributes", {}).items():
                setattr(callback, key, value)
        # Some samplers draw an epoch's order from the generators, so that it has to be drawn again
        # from where they were then. They come back to where they are now with the first batch.
        random = self._random()
        if random is None:
            draw_apart(args.seed + state.global_step, processes.rank())
        else:
            restore_random_state(random["epoch" if self._cursor.batch else "now"])

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Note where the generators are before the epoch's order is drawn."""
        self._batches = len(train_dataloader)
        self._epoch_random = random_state()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a batch whose gradient is added to."""
        self._cursor = self._cursor._replace(batch=self._cursor.batch + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's last batch and decide whether to save."""
        self._cursor = self._cursor._replace(batch=self._cursor.batch + 1)
        # transformers has counted for itself, and skipped batches by its own count.
        if state.epoch != self._cursor.epoch + self._cursor.batch / self._batches:
            raise CheckError(
                f"step {state.global_step}: transformers is at epoch {state.epoch}, esft at batch "
                f"{self._cursor.batch} of {self._batches} of epoch {self._cursor.epoch}: rows "
                f"would be left out or trained twice"
            )
        if self._interruption.signal is not None:
            control.should_save = True
        if control.should_save and self._cursor.batch == self._batches:
            # What is due at the epoch's end (a score, a rate that depends on it) comes first; a
            # resumed run goes on with the next epoch.
            control.should_save, self._owed = False, True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save now if a signal came during the evaluation."""
        self._interruption.agree()
        if self._interruption.signal is not None:
            control.should_save = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save what was due at the epoch's last step."""
        if self._owed or self._interruption.signal is not None:
            control.should_save = True
        self._owed = False
        self._cursor = self._next()

    def _own(self) -> dict[str, Any] | None:
        """Return what was saved of this process alone, if as many were saved as there are now."""
        assert self._resumed is not None
        count = processes.count()
        if count == 1 or self._resumed.manifest["environment"]["processes"] != count:
            return None
        found: dict[str, Any] = self._resumed.read("processes")[processes.rank()]
        return found

    def _random(self) -> dict[str, Any] | None:
        """Return where this process's generators were; None of one that there was not then."""
        assert self._resumed is not None
        own = self._own()
        if own is not None:
            return own["random"]
        return self._resumed.read("random") if processes.is_main() else None

    def _next(self) -> Cursor:
        cursor = self._cursor
        return Cursor(cursor.epoch + 1, 0) if cursor.batch == self._batches else cursor

    def _stateful(self) -> list[Any]:
        callbacks = [*self._trainer.callback_handler.callbacks, self._trainer.control]
        return [callback for callback in callbacks if isinstance(callback, ExportableState)]


def stopped_early(state: TrainerState) -> bool:
    """Return whether the loop had been told to stop when its state was saved."""
    control: Mapping[str, Any] = (state.stateful_callbacks or {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def load_tensors(tensors: Mapping[str, Tensor], saved: SavedState, part: str) -> None:
    """Load a part of a checkpoint into tensors of the same names, in place.

    Raises:
        CheckError: there are others in the checkpoint, or what the tensors hold afterwards is not
            what was saved.
    """
    then = saved.read(part)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in then or then[name].shape != tensor.shape:
                raise CheckError(f"{saved.folder}: holds no {name} of shape {list(tensor.shape)}")
            local(tensor).copy_(local(as_kept(then[name], tensor)))
    saved.verify(part, whole(tensors))


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load an optimizer's state, in place and exactly.

    torch's own `load_state_dict` casts to the dtype of the parameter what need not be of it:
    Adafactor's fp32 state of bf16 parameters.
    """
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        loaded = optimizer.state[parameters[index]]
        for key, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == parameters[index].shape:
                value = as_kept(value, parameters[index])
            if type(loaded[key]) is not type(value) or loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)

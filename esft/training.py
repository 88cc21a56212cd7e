"""A recipe -> a trained run directory: profile, select, train, save the delta."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from esft import processes
from esft.changes import selection_bytes
from esft.data.isolation import check_isolation
from esft.data.packing import collate
from esft.errors import EsftError, LostProcessError, RecipeError
from esft.files import refuse_existing, write_text
from esft.fingerprint import fingerprint, tokenizer_digest
from esft.inference import check_vocabulary
from esft.loading import load_tokenizer, refuse_quantised
from esft.locating import resolve
from esft.methods import make_method
from esft.moe import inspect, moe_layers
from esft.progress import SILENT, Reporter
from esft.recipe import as_recipe
from esft.recipe_sections import CheckpointSpec, Recipe
from esft.routers.losses import RouterLosses, check_losses, make_losses, silence_own_losses
from esft.run import lock as run_lock
from esft.run.base_model import BaseModel
from esft.run.checkpoint import SavedState
from esft.run.choice import Sampler, given_selection, selection_rule
from esft.run.determinism import deterministic
from esft.run.ending import Ready, end
from esft.run.fields import training_arguments, with_defaults
from esft.run.folder import (
    BAD_ROWS,
    CHECKPOINTS,
    DIVERGED,
    MATCHED,
    METRICS,
    RECIPE,
    SCORES,
    SELECTION,
)
from esft.run.guard import check_same, environment, guard, tokens_digest
from esft.run.interruption import Interrupted, Interruption, interruptible
from esft.run.labelled import check_weighing
from esft.run.movement import StartingPoint
from esft.run.out_of_memory import explain_out_of_memory
from esft.run.processes import check_launch, check_recipe, device_of, explain_loss
from esft.run.recomputation import recompute_layers
from esft.run.reporting import reporting
from esft.run.result import RunResult
from esft.run.resuming import explain_interruption, how_to_go_on, to_resume
from esft.run.scoring import Scorer
from esft.run.sharding import check_sharding
from esft.run.task_data import prepare
from esft.run.trainer import EsftTrainer
from esft.scores import Scores
from esft.selection import Selection, select
from esft.shards import open_checkpoint


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> RunResult:
    """Train a model by a recipe and save what training changed.

    `out` gets the resolved recipe, scores and selection (where experts are selected),
    `metrics.jsonl`, `checkpoints/` (if `save_strategy` is set), the delta, a card and, as its last
    file, `result.json`: a run that has one is finished.

    Args:
        recipe: a recipe, its keys as a mapping, or the path of a YAML file.
        out: the run's folder; must not exist, or be empty, unless `resume`.
        resume: go on from the last checkpoint in `out`.
        reporter: shown the progress.

    Raises:
        RecipeError, DataError, ModelError, SelectionError: the input is at fault; nothing is
            written.
        OutputError: `out` exists, or the disk is full.
        EsftError: the run to resume has changed, or training diverged.
    """
    out = Path(out)
    check_launch()
    with contextlib.ExitStack() as held:
        held.enter_context(processes.joined())
        reporter = reporter if processes.is_main() else SILENT
        with processes.together("read the recipe"):
            recipe = with_defaults(as_recipe(recipe))
            check_recipe(recipe)
        interruption = held.enter_context(interruptible())
        held.enter_context(deterministic(recipe.deterministic))
        try:
            saved = _claim(held, recipe, out, resume, reporter)
            with processes.together("prepare"):
                if processes.is_main():  # others log nothing
                    held.enter_context(reporting(recipe.training, out))
                run = _Run(recipe, out, saved, interruption, reporter)
            return run.train()
        except Interrupted as interrupted:
            explain_interruption(interrupted, out)
            reporter.note(str(interrupted))
            raise
        except LostProcessError as lost:
            raise LostProcessError(f"{lost}; {how_to_go_on(out)}") from lost


def _claim(
    held: contextlib.ExitStack, recipe: Recipe, out: Path, resume: bool, reporter: Reporter
) -> SavedState | None:
    """Lock the run's folder, once for all processes; return what it goes on from, if it does."""
    saved = None
    with processes.together("lock the run"):
        if processes.is_main():
            # Before the folder is made for the lock: to resume there must be one.
            if resume and not out.is_dir():
                raise EsftError(f"{out / CHECKPOINTS}: no complete checkpoint to resume from")
            held.enter_context(run_lock.hold(out))
            saved = to_resume(out, recipe, reporter) if resume else None
            if not resume:
                refuse_existing(out, but_for={run_lock.LOCK})
    found = processes.gathered(saved and saved.folder, "lock the run")[0]
    return None if found is None else SavedState(found)


class _Run:
    """One run: loads what the recipe names, then trains."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        saved: SavedState | None,
        interruption: Interruption,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.out, self.saved, self.reporter = recipe, out, saved, reporter
        self.interruption = interruption
        # What can fail cheaply fails first: arguments, the model's family, data, then weights.
        self.arguments = training_arguments(recipe, out)
        check_sharding(recipe, self.arguments)
        self.folder = resolve(recipe.model)
        self.anatomy = inspect(self.folder)
        refuse_quantised(self.folder)
        check_losses(recipe.losses, self.anatomy.layers, self.anatomy.model_type)
        base = open_checkpoint(self.folder)
        given = given_selection(recipe, self.anatomy, out if saved else None)
        self.selection: Selection | None = None if recipe.matches_esft else given
        # Of LoRA matched to ESFT, what ESFT would train; nothing of it does.
        self.matched: Selection | None = given if recipe.matches_esft else None
        self.tokenizer = load_tokenizer(self.folder)
        self.data = prepare(
            recipe.data, self.tokenizer, evaluation=recipe.evaluation, reporter=reporter
        )
        self.scorer = Scorer(recipe.evaluation, self.data)
        self.tokens = tokens_digest(self.data.train_set)
        # Read before training: should the base change or vanish meanwhile, nothing is lost.
        self.base = fingerprint(base)
        self.tokenizer_digest = tokenizer_digest(self.folder)
        if saved is not None:
            for note in check_same(saved, self._guard, self._environment(), recipe):
                reporter.note(note)

    def train(self) -> RunResult:
        """Do it. See the module's `train`."""
        with processes.together("prepare"):
            run, losses = self._ready()
            trainer = self._trainer(run.model, losses)
            self._note_small_data()
        # Up to here the input may be at fault, and nothing was written.
        if self.saved is None and processes.is_main():
            self._write(run.scores)
        with (
            explain_loss(),
            explain_out_of_memory(
                self.recipe,
                self.arguments.device,
                lambda: f"in step {trainer.state.global_step + 1}",
            ),
        ):
            outcome = trainer.run(self.saved)
        with explain_loss():
            return end(
                run, trainer, outcome, interruption=self.interruption, reporter=self.reporter
            )

    def _ready(self) -> tuple[Ready, RouterLosses | None]:
        """Load the model, select its experts, and make it train them."""
        set_seed(self.arguments.seed)
        base = BaseModel(
            self.recipe,
            self.folder,
            device=device_of(self.recipe),
            check=self._check,
            reporter=self.reporter,
        )
        if not self.recipe.frozen.kinds:
            base.exact()  # a model that cannot be trained is refused before it is profiled
        sampler = Sampler(self.recipe, self.tokenizer, self.data.rows, self.reporter)
        scores = self._select(sampler, base)
        match_bytes = None
        if self.matched is not None:
            match_bytes = selection_bytes(base.exact(), self.matched, self.base)
        method = make_method(self.recipe, self.selection, self.reporter, match_bytes=match_bytes)
        model = base.to_train(method)
        silence_own_losses(model, self.reporter)
        layers = moe_layers(model)
        prepared = method.prepare(model)
        base.prepared(prepared)
        method.check(prepared, self.base)
        losses = make_losses(
            self.recipe.losses, layers, self.anatomy.model_type, reporter=self.reporter
        )
        trained = sum(parameter.numel() for parameter in method.parameters(prepared).values())
        # Where most of the model trains, a copy of it would be a second model in memory.
        copied = processes.is_main() and 2 * trained < self.anatomy.total
        ready = Ready(
            recipe=self.recipe,
            out=self.out,
            folder=self.folder,
            anatomy=self.anatomy,
            base=self.base,
            tokenizer_digest=self.tokenizer_digest,
            arguments=self.arguments,
            data=self.data,
            data_identity=self._guard["data"],
            selection=self.selection,
            scores=scores,
            method=method,
            model=prepared,
            layers=layers,
            trained=trained,
            start=StartingPoint(prepared) if copied else None,
            meter=sampler.drift_meter(prepared, self.selection, scores),
            scorer=self.scorer,
        )
        return ready, losses

    def _write(self, scores: Scores | None) -> None:
        """Write what the run is, before its first step."""
        write_text(self.out / RECIPE, self.recipe.to_yaml())
        if scores is not None:
            scores.write(self.out / SCORES)
        if self.selection is not None:
            self.selection.write(self.out / SELECTION)
        if self.matched is not None:
            self.matched.write(self.out / MATCHED)
        if self.data.bad_rows.skipped:
            self.data.bad_rows.write(self.out / BAD_ROWS)

    def _check(self, model: PreTrainedModel) -> None:
        """Refuse a model that cannot be trained on this data."""
        if self.data.train_set.packed:
            check_isolation(model)
        if self.data.train_set.weighted:
            check_weighing(model)
        check_vocabulary(self.tokenizer, model, self.folder)

    def _select(self, sampler: Sampler, base: BaseModel) -> Scores | None:
        """Select experts where that is asked for and not yet done; return the scores behind it."""
        wanted = self.recipe.selects_experts or self.recipe.matches_esft
        if not wanted or self.selection is not None or self.matched is not None:
            return None
        scores = base.scores(sampler)
        selection = select(scores, **selection_rule(self.recipe).rule())
        # Where each process has counted for itself, last bits may differ on GPUs.
        selection, scores = processes.gathered((selection, scores), "select")[0]
        if self.recipe.matches_esft:
            self.matched = selection
        else:
            self.selection = selection
        return scores

    def _trainer(self, prepared: nn.Module, losses: RouterLosses | None) -> EsftTrainer:
        training = self.recipe.training
        if training.get("gradient_checkpointing"):
            recompute_layers(prepared, training.get("gradient_checkpointing_kwargs"))
        try:
            trainer = EsftTrainer(
                checkpoints=self.out / CHECKPOINTS,
                spec=self._kept(),
                guard=self._guard,
                environment=self._environment(),
                interruption=self.interruption,
                metrics=self.out / METRICS,
                diverged=self.out / DIVERGED,
                losses=losses,
                early_stopping=self.recipe.early_stopping,
                reporter=self.reporter,
                model=prepared,
                args=self.arguments,
                train_set=self.data.train_set,
                collate=functools.partial(collate, pad_id=self.data.pad_id),
                score=self.scorer.while_training,
                eval_dataset=self.data.eval.examples,
            )
            # Now instead of in its `train`: an optimizer may be unknown or not installed.
            trainer.create_optimizer()
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise RecipeError(f"training: {str(error).splitlines()[0]}") from error
        return trainer

    def _kept(self) -> CheckpointSpec:
        """Return which checkpoints to keep; the best one, too, if its weights are wanted."""
        spec = self.recipe.checkpoints
        if self.arguments.load_best_model_at_end:
            return spec.model_copy(update={"keep_best": max(spec.keep_best, 1)})
        return spec

    def _note_small_data(self) -> None:
        items, packed = len(self.data.train_set), self.data.train_set.packed
        accumulated = self.arguments.gradient_accumulation_steps
        batch = self.arguments.per_device_train_batch_size * accumulated * processes.count()
        if items < batch:
            unit = "packed block" if packed else "row"
            self.reporter.note(
                f"the training set is {items:,} {unit}{'' if items == 1 else 's'}, less than a "
                f"step's {batch:,}: every step sees all of it"
            )

    @functools.cached_property
    def _guard(self) -> dict[str, Any]:
        """What must be the same on resume; asked for once experts are selected. Reads all data."""
        return guard(self.recipe, self.base, self.selection, self.tokens)

    def _environment(self) -> dict[str, Any]:
        return environment(self.arguments)

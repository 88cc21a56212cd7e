"""A recipe -> a trained run directory: profile, select, train, save the delta."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

from esft.changes import selection_bytes
from esft.data.isolation import check_isolation
from esft.data.packing import collate
from esft.delta import read_delta
from esft.errors import EsftError, RecipeError
from esft.files import new_folder, refuse_existing, write_json, write_text
from esft.fingerprint import fingerprint, tokenizer_digest
from esft.inference import check_vocabulary
from esft.loading import load_model, load_tokenizer, refuse_quantised
from esft.locating import resolve
from esft.methods import make_method
from esft.moe import inspect, moe_layers
from esft.progress import SILENT, Reporter
from esft.recipe import as_recipe
from esft.recipe_sections import CheckpointSpec, Recipe
from esft.report.base_card import describe_base
from esft.report.card import run_card
from esft.report.delta_card import delta_card
from esft.routers.losses import RouterLosses, check_losses, make_losses, silence_own_losses
from esft.run import lock as run_lock
from esft.run.about import about_run
from esft.run.checkpoint import SavedState
from esft.run.choice import Sampler, given_selection, selection_rule
from esft.run.determinism import deterministic
from esft.run.fields import training_arguments, with_defaults
from esft.run.flops import run_flops
from esft.run.folder import (
    BAD_ROWS,
    CARD,
    CHECKPOINTS,
    DELTA,
    DIVERGED,
    MATCHED,
    METRICS,
    RECIPE,
    RESULT,
    SCORES,
    SELECTION,
    TEST_ANSWERS,
)
from esft.run.guard import check_same, environment, guard, tokens_digest
from esft.run.interruption import Interrupted, Interruption, interruptible
from esft.run.labelled import check_weighing
from esft.run.memory import peak_memory
from esft.run.movement import StartingPoint, stored_moved
from esft.run.out_of_memory import explain_out_of_memory
from esft.run.processes import refuse_several
from esft.run.recomputation import recompute_layers
from esft.run.reporting import reporting
from esft.run.result import RunResult
from esft.run.resuming import explain_interruption, to_resume
from esft.run.scoring import Scorer
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
    recipe = as_recipe(recipe)
    refuse_several()
    recipe = with_defaults(recipe)
    with interruptible() as interruption, deterministic(recipe.deterministic):
        try:
            # Before the folder is made for the lock: to resume there must be one.
            if resume and not out.is_dir():
                raise EsftError(f"{out / CHECKPOINTS}: no complete checkpoint to resume from")
            with run_lock.hold(out):
                saved = to_resume(out, recipe, reporter) if resume else None
                if not resume:
                    refuse_existing(out, but_for={run_lock.LOCK})
                with reporting(recipe.training, out):
                    return _Run(recipe, out, saved, interruption, reporter).train()
        except Interrupted as interrupted:
            explain_interruption(interrupted, out)
            reporter.note(str(interrupted))
            raise


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
        set_seed(self.arguments.seed)
        model = load_model(self.folder, device=self.recipe.device, dtype=self.recipe.dtype)
        if self.data.train_set.packed:
            check_isolation(model)
        if self.data.train_set.weighted:
            check_weighing(model)
        check_vocabulary(self.tokenizer, model, self.folder)
        sampler = Sampler(self.recipe, self.tokenizer, self.data.rows, self.reporter)
        scores = self._select(sampler, model)
        silence_own_losses(model, self.reporter)
        layers = moe_layers(model)
        match_bytes = None
        if self.matched is not None:
            match_bytes = selection_bytes(model, self.matched, self.base)
        method = make_method(self.recipe, self.selection, self.reporter, match_bytes=match_bytes)
        prepared = method.prepare(model)
        method.check(prepared, self.base)
        losses = make_losses(
            self.recipe.losses, layers, self.anatomy.model_type, reporter=self.reporter
        )
        trained = sum(parameter.numel() for parameter in method.parameters(prepared).values())
        # Where most of the model trains, a copy of it would be a second model in memory.
        start_weights = StartingPoint(prepared) if 2 * trained < self.anatomy.total else None
        meter = sampler.drift_meter(prepared, self.selection, scores)
        trainer = self._trainer(prepared, losses)
        self._note_small_data()
        # Up to here the input may be at fault, and nothing was written.
        if self.saved is None:
            write_text(self.out / RECIPE, self.recipe.to_yaml())
            if scores is not None:
                scores.write(self.out / SCORES)
            if self.selection is not None:
                self.selection.write(self.out / SELECTION)
            if self.matched is not None:
                self.matched.write(self.out / MATCHED)
            if self.data.bad_rows.skipped:
                self.data.bad_rows.write(self.out / BAD_ROWS)
        with explain_out_of_memory(
            self.recipe, model.device, lambda: f"in step {trainer.state.global_step + 1}"
        ):
            outcome = trainer.run(self.saved)
        seconds = trainer.clock.train_seconds
        try:
            evaluation = self.scorer.evaluation(prepared, self.reporter)
            test = self.scorer.test(prepared, self.reporter)
            general = self.scorer.general(prepared, self.reporter)
            about = about_run(
                self.recipe,
                self.anatomy,
                self.tokenizer_digest,
                self.selection,
                self.out / SCORES,
                outcome,
                evaluation,
                adapter=method.adapter,
            )
            # One may be there, of a run that was ended before it had a result.
            with new_folder(self.out / DELTA, replace=True) as folder:
                method.save(prepared, folder, self.base, about)
            result = RunResult(
                out=self.out,
                delta=self.out / DELTA,
                method=method.name,
                steps=outcome.steps,
                best_step=outcome.best,
                seconds=seconds,
                step_seconds=trainer.clock.step_seconds,
                tokens_per_second=trainer.state.num_input_tokens_seen / seconds,
                train_loss=outcome.loss,
                trained=trained,
                total=self.anatomy.total,
                routed=self.anatomy.routed,
                moved=None if start_weights is None else start_weights.moved(prepared),
                stored_moved=stored_moved(
                    read_delta(self.out / DELTA), open_checkpoint(self.folder)
                ),
                drift=meter.read(self.selection, self.out) if meter and self.selection else None,
                delta_bytes=sum(p.stat().st_size for p in (self.out / DELTA).glob("*.safetensors")),
                peak_memory=peak_memory(model.device),
                flops=run_flops(
                    trainer,
                    self.data.train_set,
                    layers,
                    scores or (meter.before if meter else None),
                    self.selection,
                    recomputed=bool(self.recipe.training.get("gradient_checkpointing")),
                ),
                evaluation=evaluation,
                test=test,
                general=general,
                adapter=method.adapter,
            )
            write_text(self.out / CARD, run_card(self.recipe, result, self.selection))
            write_text(self.out / DELTA / CARD, self._delta_card(result))
            if test is not None:
                test.write_answers(self.out / TEST_ANSWERS)
            write_json(self.out / RESULT, result.to_dict())
        except Interrupted:
            trainer.saving.save_once()
            raise
        return result

    def _delta_card(self, result: RunResult) -> str:
        return delta_card(
            self.recipe,
            result,
            self.selection,
            base=describe_base(self.recipe.model, self.folder, self.anatomy.architecture),
            arguments=self.arguments,
            data=self._guard["data"],
        )

    def _select(self, sampler: Sampler, model: PreTrainedModel) -> Scores | None:
        """Select experts where that is asked for and not yet done; return the scores behind it."""
        wanted = self.recipe.selects_experts or self.recipe.matches_esft
        if not wanted or self.selection is not None or self.matched is not None:
            return None
        scores = sampler.profile(model, self.folder)
        selection = select(scores, **selection_rule(self.recipe).rule())
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
        batch = self.arguments.per_device_train_batch_size * accumulated
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
        return environment(self.arguments.device)

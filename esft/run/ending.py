"""What follows a run's last step: scores, the delta, cards and, as the last file, the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from esft import processes
from esft.delta import read_delta
from esft.files import new_folder, write_json, write_text
from esft.fingerprint import Fingerprint
from esft.methods.base import Method
from esft.moe import Anatomy, MoeLayer
from esft.progress import Reporter
from esft.recipe_sections import Recipe
from esft.report.base_card import describe_base
from esft.report.card import run_card
from esft.report.delta_card import delta_card
from esft.run.about import about_run
from esft.run.drift import DriftMeter
from esft.run.flops import run_flops
from esft.run.folder import CARD, DELTA, RESULT, SCORES, TEST_ANSWERS
from esft.run.interruption import Interrupted, Interruption
from esft.run.memory import peak_memory
from esft.run.movement import Moved, StartingPoint, stored_moved
from esft.run.result import RunResult
from esft.run.scoring import Scorer
from esft.run.sharding import whole_weights
from esft.run.task_data import TaskData
from esft.run.trainer import EsftTrainer, Trained
from esft.scores import Scores
from esft.selection import Selection
from esft.shards import open_checkpoint

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Ready:
    """A run whose model is ready to train, and all that is known of it.

    Attributes:
        recipe: with every default filled in.
        out: the run's folder.
        folder: of the base.
        anatomy: of the base.
        base: its fingerprint.
        tokenizer_digest: of the base's tokenizer.
        arguments: of the training loop.
        data: what it learns from and is scored on.
        data_identity: the same, as its guard has it.
        selection: the experts that train, if any are selected.
        scores: what they were selected by, if this run profiled them.
        method: how it trains.
        model: as the method prepared it.
        layers: its MoE layers, found before it was prepared.
        trained: how many parameters train.
        start: their values before training; None where they are most of the model.
        meter: of the routers' drift, if that is measured.
        scorer: of the model.
    """

    recipe: Recipe
    out: Path
    folder: Path
    anatomy: Anatomy
    base: Fingerprint
    tokenizer_digest: str | None
    arguments: TrainingArguments
    data: TaskData
    data_identity: Mapping[str, Any]
    selection: Selection | None
    scores: Scores | None
    method: Method
    model: nn.Module
    layers: Sequence[MoeLayer]
    trained: int
    start: StartingPoint | None
    meter: DriftMeter | None
    scorer: Scorer


def end(
    run: Ready,
    trainer: EsftTrainer,
    outcome: Trained,
    *,
    interruption: Interruption,
    reporter: Reporter,
) -> RunResult:
    """Score the trained model, and write what training changed and what it came to.

    All processes score, on the same rows; the first one writes.

    Args:
        run: what was trained.
        trainer: that trained it.
        outcome: what training came to.
        interruption: ends the run; its state is saved first.
        reporter: shown the progress.

    Raises:
        DeltaError: the trained weights do not fit the base, or are not finite.
        OutputError: the disk is full or read-only.
        Interrupted: a signal came; a checkpoint of the last step is there.
    """
    try:
        # A signal may reach one process of several, which must not leave the others waiting.
        several = processes.count() > 1
        with interruption.at_a_good_moment() if several else contextlib.nullcontext():
            return _ended(run, trainer, outcome, interruption.heed, reporter)
    except Interrupted:
        trainer.saving.save_once()
        raise


def _ended(
    run: Ready, trainer: EsftTrainer, outcome: Trained, heed: Callable[[], None], reporter: Reporter
) -> RunResult:
    recipe, out, method, model = run.recipe, run.out, run.method, run.model
    seconds = trainer.clock.train_seconds
    evaluation = run.scorer.evaluation(model, reporter)
    heed()
    test = run.scorer.test(model, reporter)
    heed()
    general = run.scorer.general(model, reporter)
    heed()
    about = about_run(
        recipe,
        run.anatomy,
        run.tokenizer_digest,
        run.selection,
        out / SCORES,
        outcome,
        evaluation,
        adapter=method.adapter,
    )
    moved = None
    with whole_weights(model), processes.together("save the delta"):
        if processes.is_main():
            # One may be there, of a run that was ended before it had a result.
            with new_folder(out / DELTA, replace=True) as delta:
                method.save(model, delta, run.base, about)
            moved = None if run.start is None else run.start.moved(model)
    heed()
    folder = out if processes.is_main() else None
    drift = run.meter.read(run.selection, folder) if run.meter and run.selection else None
    heed()
    with processes.together("write the result"):
        result = RunResult(
            out=out,
            delta=out / DELTA,
            method=method.name,
            steps=outcome.steps,
            best_step=outcome.best,
            seconds=seconds,
            step_seconds=trainer.clock.step_seconds,
            tokens_per_second=trainer.state.num_input_tokens_seen / seconds,
            train_loss=outcome.loss,
            trained=run.trained,
            total=run.anatomy.total,
            routed=run.anatomy.routed,
            moved=moved,
            stored_moved=_stored_moved(run) if processes.is_main() else None,
            drift=drift,
            delta_bytes=sum(p.stat().st_size for p in (out / DELTA).glob("*.safetensors")),
            peak_memory=max(processes.gathered(peak_memory(trainer.args.device), "train")),
            flops=run_flops(
                trainer,
                run.data.train_set,
                run.layers,
                run.scores or (run.meter.before if run.meter else None),
                run.selection,
                recomputed=bool(recipe.training.get("gradient_checkpointing")),
            ),
            evaluation=evaluation,
            test=test,
            general=general,
            adapter=method.adapter,
        )
        if processes.is_main():
            write_text(out / CARD, run_card(recipe, result, run.selection))
            write_text(out / DELTA / CARD, _delta_card(run, result))
            if test is not None:
                test.write_answers(out / TEST_ANSWERS)
            write_json(out / RESULT, result.to_dict())
    return processes.gathered(result, "write the result")[0]


def _stored_moved(run: Ready) -> Moved | None:
    return stored_moved(read_delta(run.out / DELTA), open_checkpoint(run.folder))


def _delta_card(run: Ready, result: RunResult) -> str:
    return delta_card(
        run.recipe,
        result,
        run.selection,
        base=describe_base(run.recipe.model, run.folder, run.anatomy.architecture),
        arguments=run.arguments,
        data=run.data_identity,
    )

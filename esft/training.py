"""A recipe -> a trained run directory: profile, select, train, save the delta."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed

from esft.data.encode import Example, encode_rows
from esft.data.packing import TrainSet, collate, pack, sample, separate
from esft.data.rows import read_rows
from esft.errors import OutputError, RecipeError
from esft.evaluation import Evaluation, evaluate_model
from esft.files import new_folder, refuse_existing, sha256_file, write_text
from esft.loading import load_model, load_tokenizer, pick_device, resolve
from esft.methods import ExpertMethod, FullMethod, LoraMethod, Method
from esft.methods.base import parameters
from esft.moe import inspect
from esft.profiling import profile_model
from esft.progress import SILENT, Reporter
from esft.recipe import Recipe, SelectionSpec, make_recipe, read_recipe
from esft.report.card import run_card
from esft.selection import Selection, select
from esft.shards import open_checkpoint
from esft.trainer import EsftTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECIPE, SELECTION, SCORES = "recipe.yaml", "selection.json", "scores.json"
METRICS, CHECKPOINTS, DELTA, CARD = "metrics.jsonl", "checkpoints", "delta", "README.md"

# Where a recipe is silent.
_DEFAULTS = {
    "save_strategy": "no",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "lr_scheduler_type": "constant",
    "report_to": "none",
}
# What the paper settled on for its 16 B model (arXiv 2407.01906); a small model wants far more.
_LEARNING_RATES = {"esft": 1e-5, "random": 1e-5, "lora": 1e-4, "full": 3e-5}


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
        train_loss: mean over the steps of this process.
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
    train_loss: float
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


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    reporter: Reporter = SILENT,
) -> RunResult:
    """Train a model by a recipe and save what training changed.

    `out` gets the resolved recipe, scores and selection (where experts are selected),
    `metrics.jsonl`, `checkpoints/` (if `save_strategy` is set), the delta and a card.

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
    if isinstance(recipe, str | Path):
        recipe = read_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = make_recipe(recipe)
    if resume:
        if (out / DELTA).exists():
            raise OutputError(f"{out / DELTA}: this run is complete; there is nothing to resume")
    else:
        refuse_existing(out)
    return _Run(recipe, out, resume, reporter).train()


class _Run:
    """One run: loads what the recipe names, then trains."""

    def __init__(self, recipe: Recipe, out: Path, resume: bool, reporter: Reporter) -> None:
        self.recipe, self.out, self.resume, self.reporter = recipe, out, resume, reporter
        # What can fail cheaply fails first: arguments, the model's family, data, then weights.
        self.arguments = _arguments(recipe, out)
        self.folder = resolve(recipe.model)
        self.anatomy = inspect(self.folder)
        self.base = open_checkpoint(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        rows = read_rows(recipe.data.train)
        self.examples = encode_rows(rows, self.tokenizer)
        self.train_set = _train_set(recipe, self.examples, self.tokenizer, reporter)
        self.eval_examples = (
            encode_rows(read_rows(recipe.data.eval), self.tokenizer) if recipe.data.eval else None
        )

    def train(self) -> RunResult:
        """Do it. See the module's `train`."""
        set_seed(self.arguments.seed)
        model = load_model(self.folder, device=self.recipe.device, dtype=self.recipe.dtype)
        selection = self._selection(model)
        method = _method(self.recipe, selection)
        write_text(self.out / RECIPE, self.recipe.to_yaml())
        prepared = method.prepare(model)
        trained = sum(p.numel() for p in parameters(prepared).values())
        trainer = EsftTrainer(
            checkpoints=self.out / CHECKPOINTS,
            guard=self._guard(selection),
            metrics=self.out / METRICS,
            eval_examples=self.eval_examples,
            reporter=self.reporter,
            model=prepared,
            args=self.arguments,
            train_dataset=self.train_set,
            data_collator=functools.partial(collate, pad_id=_pad_id(self.tokenizer)),
        )
        start = time.monotonic()
        outcome = trainer.resume() if self.resume else trainer.train()
        seconds = time.monotonic() - start
        evaluation = evaluate_model(prepared, self.eval_examples) if self.eval_examples else None
        about = self._about(selection, outcome.global_step, evaluation)
        with new_folder(self.out / DELTA) as folder:
            method.save(prepared, folder, self.base, about)
        result = RunResult(
            out=self.out,
            delta=self.out / DELTA,
            method=method.name,
            steps=outcome.global_step,
            seconds=seconds,
            tokens_per_second=trainer.tokens_seen / seconds,
            train_loss=outcome.training_loss,
            trained=trained,
            total=self.anatomy.total,
            routed=self.anatomy.routed,
            delta_bytes=sum(p.stat().st_size for p in (self.out / DELTA).glob("*.safetensors")),
            peak_memory=_peak_memory(model.device),
            evaluation=evaluation,
        )
        write_text(self.out / CARD, run_card(self.recipe, result, selection))
        return result

    def _selection(self, model: PreTrainedModel) -> Selection | None:
        """Read the selection, or profile the model and select; write both beside the run."""
        recipe = self.recipe
        if recipe.method in ("lora", "full"):
            return None
        if self.resume and (self.out / SELECTION).is_file():
            return Selection.read(self.out / SELECTION)
        if isinstance(recipe.selection, str):
            selection = Selection.read(recipe.selection)
        else:
            spec = recipe.selection or SelectionSpec()
            rule = spec.rule()
            if recipe.method == "random":
                rule.setdefault("random", spec.seed)
            drawn = sample(self.examples, spec.tokens, spec.seed, seq_len=spec.seq_len)
            scores = profile_model(
                model, drawn, count=spec.count, name=recipe.model, reporter=self.reporter
            )
            selection = select(scores, **rule)
            scores.write(self.out / SCORES)
        selection.check_against({x.index: x.num_experts for x in self.anatomy.layers})
        selection.write(self.out / SELECTION)
        return selection

    def _guard(self, selection: Selection | None) -> dict[str, Any]:
        """Return what must be the same when the run is resumed."""
        # Where files lie may change; what is in them may not.
        recipe = self.recipe.model_dump(exclude={"device", "model", "data"})
        headers = {
            name: f"{entry.dtype} {list(entry.shape)}" for name, entry in self.base.entries.items()
        }
        data = self.recipe.data
        return {
            "recipe": recipe,
            "base": headers,
            "data": data.model_dump(exclude={"train", "eval"})
            | {
                "train": sha256_file(Path(data.train)),
                "eval": sha256_file(Path(data.eval)) if data.eval else None,
            },
            "selection": None if selection is None else selection.to_dict()["experts"],
        }

    def _about(
        self, selection: Selection | None, steps: int, evaluation: Evaluation | None
    ) -> dict[str, Any]:
        """Return what the delta's manifest says of the run."""
        about: dict[str, Any] = {
            "method": self.recipe.method,
            "base": {
                "name": self.recipe.model,
                "model_type": self.anatomy.model_type,
                "architecture": self.anatomy.architecture,
            },
            "training": {
                "steps": steps,
                "recipe": self.recipe.model_dump(exclude_none=True),
                "evaluation": None if evaluation is None else evaluation.to_dict(),
            },
        }
        if selection is not None:
            about["selection"] = selection.to_dict()
        return about


def _arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    device = pick_device(recipe.device)
    fields: dict[str, Any] = {
        "learning_rate": _LEARNING_RATES[recipe.method],
        **_DEFAULTS,
        **recipe.training,
        "output_dir": str(out),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    if fields.get("eval_strategy", "no") != "no" and not recipe.data.eval:
        raise RecipeError("training.eval_strategy: is set, but data.eval names no test set")
    try:
        arguments = TrainingArguments(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"training: {str(error).splitlines()[0]}") from error
    # One process trains on one device; with several in sight Trainer would split batches.
    _ = arguments.n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _train_set(
    recipe: Recipe, examples: list[Example], tokenizer: Any, reporter: Reporter
) -> TrainSet:
    data = recipe.data
    if data.packing:
        return pack(
            examples,
            data.max_length,
            pad_id=_pad_id(tokenizer),
            loss_on=data.loss_on,
            reporter=reporter,
        )
    return separate(examples, data.max_length, loss_on=data.loss_on, reporter=reporter)


def _pad_id(tokenizer: Any) -> int:
    # Padding is marked by position, never by id, so any id will do.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def _method(recipe: Recipe, selection: Selection | None) -> Method:
    if recipe.method == "lora":
        return LoraMethod(recipe.lora)
    if recipe.method == "full":
        return FullMethod()
    assert selection is not None
    return ExpertMethod(selection, name=recipe.method, param_dtype=recipe.param_dtype)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""The `training` section of a recipe: fields of `transformers.TrainingArguments`, checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from esft.errors import RecipeError, nearest
from esft.loading import pick_device
from esft.recipe_text import Places

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from esft.recipe_sections import Recipe

# Where a recipe is silent. The learning rates are the paper's for its 16 B model
# (arXiv 2407.01906, section 4.1).
_DEFAULTS: dict[str, Any] = {
    "save_strategy": "no",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "lr_scheduler_type": "constant",
    "report_to": "none",
}
_LEARNING_RATES = {"esft": 1e-5, "random": 1e-5, "lora": 1e-4, "full": 3e-5}

_ONE_PROCESS = "a run is one process so far"
_ITS_OWN_EVALUATION = "rows are scored as by esft eval, whose memory does not depend on it"
# Fields that esft sets itself or does not honour, and why.
_NOT_HONOURED = {
    "output_dir": "the folder is given by --out",
    "resume_from_checkpoint": "resume with --resume",
    "use_cpu": "set device: cpu instead",
    "deepspeed": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
    "fp16": "training in fp16 needs a gradient scaler, which cannot be resumed; use bf16",
    "bf16_full_eval": _ITS_OWN_EVALUATION,
    "fp16_full_eval": _ITS_OWN_EVALUATION,
    "per_device_eval_batch_size": _ITS_OWN_EVALUATION,
    "eval_accumulation_steps": _ITS_OWN_EVALUATION,
    "batch_eval_metrics": _ITS_OWN_EVALUATION,
    "include_for_metrics": _ITS_OWN_EVALUATION,
    "save_total_limit": "set checkpoints.keep_last instead",
    "ignore_data_skip": "a resumed run would train on rows twice",
    "save_only_model": "a checkpoint holds what resuming needs",
    "enable_jit_checkpoint": "set save_strategy: steps instead",
    "load_best_model_at_end": "the last step's weights are saved",
    "push_to_hub": "upload the delta's folder yourself",
    "hub_token": "a run writes its recipe down; set HF_TOKEN, or run hf auth login",
    "auto_find_batch_size": "a batch size found by failing would not be reproducible",
    "remove_unused_columns": "the rows have no columns to remove",
}
_ABOVE_ZERO = (
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
)
_SEEDS = ("seed", "data_seed")  # NumPy's take 32 bits


def check_training(training: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Check the section key by key and return it with every value in its field's type.

    Raises:
        RecipeError: a key is no field (suggests the nearest) or is not honoured (says why), or
            its value is not of the field's type or out of range.
    """
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    checked = {}
    for key, value in training.items():
        place = places.of(("training", key))
        if key not in fields:
            hint = nearest(key, fields) or "; training takes the fields of TrainingArguments"
            raise RecipeError(f"{place}: unknown key{hint}")
        if key in _NOT_HONOURED and value:
            raise RecipeError(f"{place}: cannot be set: {_NOT_HONOURED[key]}")
        try:
            checked[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RecipeError(
                f"{place}: {reason[:1].lower()}{reason[1:]} (got {value!r})"
            ) from None
        if key in _ABOVE_ZERO and checked[key] is not None and not checked[key] > 0:
            raise RecipeError(f"{place}: must be above 0 (got {value!r})")
        if key in _SEEDS and checked[key] is not None and not 0 <= checked[key] < 2**32:
            raise RecipeError(f"{place}: must be from 0 to {2**32 - 1} (got {value!r})")
    return checked


def with_defaults(recipe: Recipe) -> Recipe:
    """Return a recipe whose `training` section also states what esft chooses where it is silent."""
    defaults = _DEFAULTS | {"learning_rate": _LEARNING_RATES[recipe.method]}
    return recipe.model_copy(update={"training": defaults | recipe.training})


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """Make the arguments for transformers' training loop.

    Raises:
        RecipeError: transformers refuses them.
        ModelError: the device is not there.
    """
    from transformers import TrainingArguments

    device = pick_device(recipe.device)
    pinned = {"dataloader_pin_memory": device.type != "cpu"}
    own = {
        "output_dir": str(out),
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    try:
        arguments = TrainingArguments(**(pinned | recipe.training | own))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {str(error).splitlines()[0]}") from error
    # One process trains on one device; with several in sight Trainer would split batches.
    _ = arguments.n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments

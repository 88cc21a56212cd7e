"""The `training` section of a recipe: fields of `transformers.TrainingArguments`, checked."""

from __future__ import annotations

import dataclasses
import importlib.util
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from esft.errors import RecipeError, nearest
from esft.loading import pick_device
from esft.measures.domains import domain_names
from esft.recipe_text import Places
from esft.run.reporting import PROJECT

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from esft.recipe_sections import EvaluationSpec, Recipe

# Where a recipe is silent. The learning rates are the paper's for its 16 B model
# (arXiv 2407.01906, section 4.1).
_DEFAULTS: dict[str, Any] = {
    "save_strategy": "no",
    "logging_steps": 10,
    "lr_scheduler_type": "constant",
    "report_to": "none",
}
_LEARNING_RATES = {"esft": 1e-5, "random": 1e-5, "lora": 1e-4, "hot-lora": 1e-4, "full": 3e-5}
# The trainer is not told: `esft.run.recomputation` does it.
_NOT_PASSED_ON = ("gradient_checkpointing", "gradient_checkpointing_kwargs")

# Fields that do in a run of esft what transformers says they do.
_HONOURED = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    average_tokens_across_devices label_smoothing_factor neftune_noise_alpha
    bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    seed data_seed train_sampling_strategy
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    logging_strategy logging_steps logging_first_step log_level skip_memory_metrics
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps
    load_best_model_at_end metric_for_best_model greater_is_better
    fsdp fsdp_config
"""
HONOURED = frozenset(_HONOURED.split())

_FOR_THE_EXPERTS = "it is set as experts that no token of a process chose need it"
_LAUNCHER = "the launcher (torchrun, accelerate launch) says it"
_ONE_WRITER = "the first process writes and tells for all"
_ITS_OWN_EVALUATION = "rows are scored as by esft eval, whose memory does not depend on it"
_NOTHING_PUSHED = "nothing is uploaded; upload the delta's folder yourself"
_UNUSED = "transformers' training loop has no use for it"
# Fields that esft sets itself or does not honour, and why; `esft.run.fields.HONOURED` are the
# others. What is false, empty or null asks for nothing and is let through.
NOT_HONOURED = {
    "output_dir": "the folder is given by --out",
    "resume_from_checkpoint": "resume with --resume",
    "use_cpu": "set device: cpu instead",
    "full_determinism": "set deterministic: true, beside training and not in it",
    "deepspeed": "no delta is written from its buffers; set training.fsdp, which shards as much",
    "parallelism_config": "launched processes share the rows, with training.fsdp the model",
    "ddp_find_unused_parameters": _FOR_THE_EXPERTS,
    "ddp_bucket_cap_mb": _FOR_THE_EXPERTS,
    "ddp_broadcast_buffers": _FOR_THE_EXPERTS,
    "ddp_static_graph": _FOR_THE_EXPERTS,
    "ddp_backend": "NCCL between GPUs, gloo between CPUs",
    "ddp_timeout": "set ESFT_TIMEOUT, in seconds, where the processes are launched",
    "local_rank": _LAUNCHER,
    "log_on_each_node": _ONE_WRITER,
    "log_level_replica": _ONE_WRITER,
    "save_on_each_node": _ONE_WRITER,
    "accelerator_config": "its settings would change batches and accumulation unseen; set the "
    "fields for them (gradient_accumulation_steps, dataloader_drop_last, ...)",
    "bf16_full_eval": _ITS_OWN_EVALUATION,
    "fp16_full_eval": _ITS_OWN_EVALUATION,
    "per_device_eval_batch_size": _ITS_OWN_EVALUATION,
    "eval_accumulation_steps": _ITS_OWN_EVALUATION,
    "eval_do_concat_batches": _ITS_OWN_EVALUATION,
    "eval_use_gather_object": _ITS_OWN_EVALUATION,
    "prediction_loss_only": _ITS_OWN_EVALUATION,
    "batch_eval_metrics": _ITS_OWN_EVALUATION,
    "include_for_metrics": _ITS_OWN_EVALUATION,
    "save_total_limit": "set checkpoints.keep_last instead",
    "ignore_data_skip": "a resumed run would train on rows twice",
    "restore_callback_states_from_checkpoint": "a resumed run has what it needs",
    "save_only_model": "a checkpoint holds what resuming needs",
    "enable_jit_checkpoint": "set save_strategy: steps instead",
    "push_to_hub": _NOTHING_PUSHED,
    "hub_token": "a run writes its recipe down; set HF_TOKEN, or run hf auth login",
    "hub_private_repo": _NOTHING_PUSHED,
    "hub_model_id": _NOTHING_PUSHED,
    "hub_strategy": _NOTHING_PUSHED,
    "hub_always_push": _NOTHING_PUSHED,
    "hub_revision": _NOTHING_PUSHED,
    "auto_find_batch_size": "a batch size found by failing would not be reproducible",
    "remove_unused_columns": "the rows have no columns to remove",
    "label_names": "labels are made from data.loss_on",
    "length_column_name": "the rows' lengths are counted",
    "use_cache": "training keeps no cache of keys and values",
    "torch_compile": "the experts' kernels and the hooks of attaching are not compiled",
    "torch_compile_backend": "torch_compile cannot be set",
    "torch_compile_mode": "torch_compile cannot be set",
    "use_liger_kernel": "its loss takes other labels than those that esft divides by",
    "liger_kernel_config": "use_liger_kernel cannot be set",
    "optim_target_modules": "its optimizers project linear layers, and experts are stacked",
    "include_num_input_tokens_seen": "metrics.jsonl has tokens already",
    "logging_nan_inf_filter": "a loss that is not finite stops the run instead",
    "debug": "a loss or gradient that is not finite stops the run, and its rows are named",
    "disable_tqdm": "esft shows progress of its own, and none where stderr is no terminal",
    "dataloader_in_order": "batches always come in order",
    "do_train": _UNUSED,
    "do_eval": _UNUSED,
    "do_predict": _UNUSED,
}
# transformers 5.23 renamed two fields; the names that 5.17 knows, too, are kept in a recipe.
_RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
METRIC = "metric_for_best_model"
_NEEDS_SCORES = {METRIC: None, "load_best_model_at_end": False}
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that wait for a metric
_ABOVE_ZERO = (
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
)
_SEEDS = ("seed", "data_seed")  # NumPy's take 32 bits
# Optimizers whose steps and resumption are tested. Of the rest, some update weights in the
# backward pass, some evaluate at other weights than they train, some keep a state that no
# checkpoint of esft's can hold.
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = (
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)


def check_training(training: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Check the section key by key and return it with every value in its field's type.

    Raises:
        RecipeError: a key is no field (suggests the nearest) or is not honoured (says why), or
            its value is not of the field's type or out of range.
    """
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    checked: dict[str, Any] = {}
    for key, value in training.items():
        place = places.of(("training", key))
        name = _RENAMED.get(key, key)
        if key not in fields and name not in HONOURED:
            hint = nearest(key, fields) or "; training takes the fields of TrainingArguments"
            raise RecipeError(f"{place}: unknown key{hint}")
        if name not in HONOURED and value:
            why = NOT_HONOURED.get(name, "it is newer than this version of esft")
            raise RecipeError(f"{place}: cannot be set: {why}")
        try:
            kind = bool if name == "fsdp" else hints.get(name) or hints[key]
            found = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RecipeError(
                f"{place}: {reason[:1].lower()}{reason[1:]} (got {value!r})"
            ) from None
        if name in _ABOVE_ZERO and found is not None and not found > 0:
            raise RecipeError(f"{place}: must be above 0 (got {value!r})")
        if name in _SEEDS and found is not None and not 0 <= found < 2**32:
            raise RecipeError(f"{place}: must be from 0 to {2**32 - 1} (got {value!r})")
        if name == "optim":
            _check_optimizer(found, place)
        if checked.setdefault(name, found) != found:
            raise RecipeError(f"{place}: contradicts training.{name}, its other name")
    return checked


def _check_optimizer(name: str, place: str) -> None:
    known = (*OPTIMIZERS, *BITSANDBYTES)
    if name not in known:
        raise RecipeError(
            f"{place}: {name} is not among the optimizers that are known to train and to resume "
            f"here{nearest(name, known)}; they are {', '.join(OPTIMIZERS)}, and bitsandbytes' "
            f"{', '.join(BITSANDBYTES[:2])} and more"
        )
    if name in BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"{place}: {name} needs bitsandbytes: pip install bitsandbytes")


def logged_names(evaluation: EvaluationSpec) -> list[str]:
    """Return the names of what an evaluation logs.

    Raises:
        DataError: the folder of other domains cannot be read.
    """
    scores = dict.fromkeys(f"eval_{name}" for name in ("exact_match", *evaluation.metrics))
    losses = [f"eval_general_{name}_loss" for name in domain_names(evaluation.general)]
    return [
        "eval_loss",
        *scores,
        "eval_perplexity",
        *(["eval_general_loss"] if losses else []),
        *losses,
    ]


def greater_is_better(metric: str) -> bool:
    """Return whether more of what an evaluation logs by this name is better."""
    return not metric.endswith(("_loss", "_perplexity"))


def full_name(metric: str) -> str:
    """Return a metric's name as it is logged; `eval_` may be left out in a recipe."""
    return metric if metric.startswith("eval_") else f"eval_{metric}"


def check_best(
    training: Mapping[str, Any],
    places: Places,
    *,
    evaluation: EvaluationSpec,
    early_stopping: bool,
) -> None:
    """Check what looks for the best step: there must be scores, and checkpoints of those steps.

    Args:
        training: the section, after `check_training`.
        places: finds the line of a key for messages.
        evaluation: the recipe's section: what an evaluation logs.
        early_stopping: whether the recipe stops early.

    Raises:
        RecipeError: the metric is unknown (names those that are known), nothing is scored, or the
            best step would have no checkpoint.
    """
    metric = training.get(METRIC)
    if metric is not None and full_name(metric) not in (known := logged_names(evaluation)):
        raise RecipeError(
            f"{places.of(('training', METRIC))}: no metric is called {metric}"
            f"{nearest(full_name(metric), known)}; known are {', '.join(known)}"
        )
    scored = str(training.get("eval_strategy", "no"))
    if scored == "no":
        wanted = [
            key for key, silent in _NEEDS_SCORES.items() if training.get(key, silent) != silent
        ]
        asked = [("training", key) for key in wanted] + [("early_stopping",)] * early_stopping
        if training.get("lr_scheduler_type") in _BY_METRIC:
            asked.append(("training", "lr_scheduler_type"))
        if str(training.get("save_strategy")) == "best":
            asked.append(("training", "save_strategy"))
        if asked:
            raise RecipeError(
                f"{places.of(asked[0])}: needs scores to compare: set training.eval_strategy "
                f"(and data.eval)"
            )
    saved = str(training.get("save_strategy", "no"))
    if training.get("load_best_model_at_end") and saved not in (scored, "best"):
        raise RecipeError(
            f"{places.of(('training', 'load_best_model_at_end'))}: the best step's weights come "
            f"from its checkpoint: set training.save_strategy to best, or to {scored} as "
            f"training.eval_strategy is"
        )


def with_defaults(recipe: Recipe) -> Recipe:
    """Return a recipe whose `training` section also states what esft chooses where it is silent."""
    defaults = _DEFAULTS | {"learning_rate": _LEARNING_RATES[recipe.method]}
    training = defaults | recipe.training
    if str(training.get("eval_strategy", "no")) != "no":
        # transformers takes more perplexity for better.
        metric = full_name(training.get(METRIC) or "eval_loss")
        training[METRIC] = metric
        if training.get("greater_is_better") is None:
            training["greater_is_better"] = greater_is_better(metric)
    return recipe.model_copy(update={"training": training})


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """Make the arguments for transformers' training loop.

    Raises:
        RecipeError: transformers refuses them, or they ask for fp16 on a CPU.
        ModelError: the device is not there.
    """
    from transformers import TrainingArguments

    device = pick_device(recipe.device)
    if recipe.training.get("fp16") and device.type == "cpu":
        raise RecipeError(
            "training.fp16: needs a GPU: a CPU computes fp16 in software, and no faster than fp32; "
            "use bf16"
        )
    pinned = {
        "dataloader_pin_memory": device.type != "cpu",
        "project": PROJECT,
        "run_name": out.resolve().name,
    }
    chosen = {k: v for k, v in recipe.training.items() if k not in _NOT_PASSED_ON}
    own = {
        # A family's own code may pass an expert by that no token of this process chose.
        "ddp_find_unused_parameters": True,
        "output_dir": str(out),
        "use_cpu": device.type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    try:
        arguments = TrainingArguments(**(pinned | chosen | own))
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(f"training: {str(error).splitlines()[0]}") from error
    # One process trains on one device; with several in sight Trainer would split batches.
    _ = arguments.n_gpu
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments

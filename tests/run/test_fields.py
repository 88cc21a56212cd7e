"""The `training` section: no field of transformers' acts unnoticed, none is ignored in silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from esft.errors import EsftError, RecipeError
from esft.recipe import make_recipe
from esft.run.fields import HONOURED, NOT_HONOURED, training_arguments, with_defaults

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
RENAMED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since 5.23


def made(training: dict[str, Any], **keys: Any) -> Any:
    data = {"train": "t.jsonl", "eval": "e.jsonl"}
    return make_recipe({"model": "m", "data": data, "training": training} | keys)


def test_every_field_is_honoured_or_refused() -> None:
    assert not HONOURED & NOT_HONOURED.keys()
    # Whichever version of transformers this is: a field that is new to esft must be looked at.
    assert FIELDS.keys() - RENAMED <= HONOURED | NOT_HONOURED.keys()


@pytest.mark.parametrize("field", sorted(NOT_HONOURED.keys() & FIELDS.keys()))
def test_a_field_that_is_not_honoured_is_refused_with_its_reason(field: str) -> None:
    with pytest.raises(RecipeError) as caught:
        made({field: 1})
    assert str(caught.value) == f"training.{field}: cannot be set: {NOT_HONOURED[field]}"
    assert len(NOT_HONOURED[field]) > 15


# What a field is set to, for each that reaches transformers under its own name.
VALUES: dict[str, Any] = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 3,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 0.3,
    "num_train_epochs": 2.5,
    "max_steps": 7,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 5,
    "average_tokens_across_devices": False,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "bf16": True,
    "torch_empty_cache_steps": 4,
    "seed": 9,
    "data_seed": 8,
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "fork",
    "logging_strategy": "epoch",
    "logging_steps": 6,
    "logging_first_step": True,
    "log_level": "error",
    "skip_memory_metrics": False,
    "report_to": "none",
    "run_name": "mine",
    "project": "ours",
    "trackio_space_id": "space",
    "trackio_bucket_id": "bucket",
    "trackio_static_space_id": "static",
    "eval_strategy": "epoch",
    "eval_steps": 4,
    "eval_delay": 2,
    "eval_on_start": True,
    "save_strategy": "epoch",
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_perplexity",
    "greater_is_better": False,
    "fsdp": True,
}
NEEDS: dict[str, dict[str, Any]] = {
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "metric_for_best_model": {"eval_strategy": "epoch"},
    "greater_is_better": {"eval_strategy": "epoch"},
}
# Three are a GPU's; gradient checkpointing is not transformers' but esft's; fsdp_config has the
# defaults filled in.
ELSEWHERE = {
    "tf32",
    "fp16",
    "dataloader_pin_memory",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "fsdp_config",
}


def test_the_table_has_every_honoured_field() -> None:
    assert VALUES.keys() | ELSEWHERE == HONOURED


@pytest.mark.parametrize("field", sorted(VALUES.keys() & FIELDS.keys()))
def test_an_honoured_field_reaches_transformers(field: str, tmp_path: Path) -> None:
    recipe = made({**NEEDS.get(field, {}), field: VALUES[field]}, device="cpu")
    found = getattr(training_arguments(with_defaults(recipe), tmp_path / "run"), field)
    wanted = [] if VALUES[field] == "none" else VALUES[field]
    assert getattr(found, "value", found) == wanted
    default = FIELDS[field].default
    assert found != default or default == wanted


@pytest.mark.parametrize("value", [True, False])
def test_gradient_checkpointing_has_two_names(value: bool) -> None:
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert made({name: value}).training == {"gradient_checkpointing": value}
    both = {"gradient_checkpointing": value, "activation_checkpointing": not value}
    with pytest.raises(RecipeError, match=r"contradicts training\.gradient_checkpointing, its oth"):
        made(both)


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    recipe = made({"fp16": True}, device="cpu")
    with pytest.raises(RecipeError, match=r"^training\.fp16: needs a GPU: "):
        training_arguments(with_defaults(recipe), tmp_path / "run")


@pytest.mark.parametrize(
    ("training", "keys", "message"),
    [
        (
            {"eval_strategy": "steps", "metric_for_best_model": "eval_los"},
            {},
            r'metric_for_best_model: no metric is called eval_los; did you mean "eval_loss"\?; '
            r"known are eval_loss, eval_exact_match, eval_perplexity$",
        ),
        (
            {},
            {"early_stopping": {"patience": 2}},
            r"early_stopping: needs scores to compare: set training\.eval_strategy",
        ),
        ({"load_best_model_at_end": True}, {}, "load_best_model_at_end: needs scores to compare"),
        ({"metric_for_best_model": "loss"}, {}, "metric_for_best_model: needs scores to compare"),
        ({"save_strategy": "best"}, {}, "save_strategy: needs scores to compare"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            {},
            "lr_scheduler_type: needs scores to compare",
        ),
        (
            {"eval_strategy": "steps", "load_best_model_at_end": True},
            {},
            "load_best_model_at_end: the best step's weights come from its checkpoint: set "
            "training.save_strategy to best, or to steps as",
        ),
        ({}, {"early_stopping": {"patience": 0}}, r"early_stopping\.patience: .* greater than 0"),
        ({}, {"early_stopping": {"patiance": 1}}, r'patiance: unknown key; did you mean "patience'),
        ({"optim": "lomo"}, {}, "training.optim: lomo is not among the optimizers that are known"),
    ],
)
def test_settings_that_do_not_fit_together(
    training: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(EsftError, match=message):
        made(training, **keys)


@pytest.mark.parametrize(
    ("metric", "name", "greater"),
    [
        (None, "eval_loss", False),
        ("loss", "eval_loss", False),
        ("exact_match", "eval_exact_match", True),
        ("eval_perplexity", "eval_perplexity", False),
    ],
)
def test_a_metric_knows_its_direction(metric: str | None, name: str, greater: bool) -> None:
    recipe = made({"eval_strategy": "steps", "metric_for_best_model": metric})
    training = with_defaults(recipe).training
    assert (training["metric_for_best_model"], training["greater_is_better"]) == (name, greater)

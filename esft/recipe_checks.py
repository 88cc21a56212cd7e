"""What a recipe's sections must be together: each may be right, and the whole make no sense."""

from __future__ import annotations

import re

from esft.errors import RecipeError, SelectionError
from esft.recipe_sections import (
    FrozenSpec,
    LoraSpec,
    LossSpec,
    Recipe,
    SelectionSpec,
    TrainSpec,
)
from esft.recipe_text import Places
from esft.selection_rule import METRICS, make_rule


def check_together(recipe: Recipe, places: Places) -> None:
    """Refuse sections that contradict each other, or ask for what the method does not do.

    Args:
        recipe: each of whose values is right by itself.
        places: finds the line of a key for messages.

    Raises:
        RecipeError: names the line, or the override.
    """
    selects = recipe.selects_experts or recipe.matches_esft
    if not recipe.trains_experts:
        if recipe.selection is not None and not selects:
            raise RecipeError(
                f"{places.of(('selection',))}: method {recipe.method} trains no selection; "
                f"leave it out, or use method: esft"
            )
        if recipe.param_dtype != "float32" and not recipe.selects_experts:
            raise RecipeError(
                f"{places.of(('param_dtype',))}: is of selected experts; with method "
                f"{recipe.method} set dtype"
            )
    if recipe.train is not None:
        _check_train(recipe, recipe.train, places)
    if recipe.lora is not None:
        _check_lora(recipe, recipe.lora, places)
    if recipe.method == "random" and isinstance(recipe.selection, str):
        raise RecipeError(
            f"{places.of(('selection',))}: method random draws its own experts, as many as a rule "
            f"would pick; give the rule (metric: {' or '.join(METRICS)}, p, ...) instead of a file"
        )
    if recipe.frozen_dtype is not None:
        _check_frozen(recipe, places)
    if recipe.losses is not None:
        _check_losses(recipe.losses, places)
    if isinstance(recipe.selection, SelectionSpec):
        _check_rule(recipe, recipe.selection, places)
    if recipe.checkpoints.keep_best:
        scored = recipe.training.get("eval_strategy", "no") != "no"
        if not scored or recipe.training.get("save_strategy", "no") == "no":
            raise RecipeError(
                f"{places.of(('checkpoints', 'keep_best'))}: needs training.save_strategy and "
                f"training.eval_strategy: only checkpoints of steps that are scored can be best"
            )
    _check_data(recipe, places)
    if recipe.data.eval is None and recipe.data.eval_rows is None:
        asked = {"eval_strategy": "no", "eval_on_start": False}
        for key, silent in asked.items():
            if recipe.training.get(key, silent) != silent:
                raise RecipeError(
                    f"{places.of(('training', key))}: is set, but data.eval names no test set"
                )


def _check_data(recipe: Recipe, places: Places) -> None:
    if recipe.data.eval is not None and recipe.data.eval_rows is not None:
        raise RecipeError(
            f"{places.of(('data', 'eval_rows'))}: data.eval names validation rows already; leave "
            f"one of them out"
        )
    if recipe.data.last_turn_only and recipe.data.loss_on == "all":
        raise RecipeError(
            f"{places.of(('data', 'last_turn_only'))}: says to learn the last turn, and "
            f"data.loss_on to learn all tokens; leave one of them out"
        )
    by_length = recipe.training.get("train_sampling_strategy") == "group_by_length"
    if by_length and recipe.data.packing:
        raise RecipeError(
            f"{places.of(('training', 'train_sampling_strategy'))}: packed blocks are all of one "
            f"length, there is nothing to group; set data.packing: false"
        )


def _check_lora(recipe: Recipe, lora: LoraSpec, places: Places) -> None:
    if recipe.method not in ("lora", "hot-lora"):
        raise RecipeError(
            f"{places.of(('lora',))}: is for the methods lora and hot-lora, not {recipe.method}"
        )
    if lora.match is not None and lora.r is not None:
        raise RecipeError(
            f"{places.of(('lora', 'match'))}: chooses the rank, and lora.r gives one; leave one of "
            f"them out"
        )
    if recipe.method == "hot-lora":
        for key in ("match", "target_modules", "target_parameters"):
            if getattr(lora, key) != LoraSpec.model_fields[key].default:
                raise RecipeError(
                    f"{places.of(('lora', key))}: is for method: lora; hot-lora adapts the "
                    f"selected experts, and nothing else"
                )


def _check_losses(losses: LossSpec, places: Places) -> None:
    if losses.device_balance and losses.devices is None:
        raise RecipeError(
            f"{places.of(('losses', 'device_balance'))}: needs losses.devices: how many devices, "
            f"or the ids of each one's experts"
        )
    if losses.devices is not None and not losses.device_balance:
        raise RecipeError(f"{places.of(('losses', 'devices'))}: is for losses.device_balance")
    if isinstance(losses.devices, int) and losses.devices < 1:
        raise RecipeError(f"{places.of(('losses', 'devices'))}: must be above 0")


def _check_train(recipe: Recipe, train: TrainSpec, places: Places) -> None:
    experts = places.of(("train", "experts"))
    if not recipe.trains_experts:
        instead = {
            "lora": "lora.target_modules says where adapters go",
            "hot-lora": "the selected experts have adapters, and nothing else trains",
            "full": "everything trains",
        }
        raise RecipeError(
            f"{places.of(('train',))}: is for the methods esft and random; with method "
            f"{recipe.method} {instead[recipe.method]}"
        )
    if train.experts == "selection":
        return
    if recipe.method == "random":
        raise RecipeError(
            f"{experts}: is {train.experts}, which leaves nothing to chance; use method: esft"
        )
    if recipe.selection is not None:
        raise RecipeError(
            f"{experts}: is {train.experts}, and selection names some; leave one of them out"
        )
    if train.experts == "none" and not any(train.parts.values()):
        raise RecipeError(
            f"{experts}: is none, and so nothing would train; turn on one of "
            f"train.{', train.'.join(train.parts)}"
        )


def _check_frozen(recipe: Recipe, places: Places) -> None:
    place = places.of(("frozen_dtype",))
    if recipe.method == "full":
        raise RecipeError(
            f"{place}: method full trains every weight; there is nothing frozen to store smaller"
        )
    if recipe.method == "lora":
        raise RecipeError(
            f"{place}: PEFT's adapters need the stacks of experts as ordinary weights; "
            f"method: hot-lora trains factors of the selected experts over frozen ones in 8 or "
            f"4 bits"
        )
    kinds = recipe.frozen.kinds
    if not kinds:
        parts = ", ".join(FrozenSpec.model_fields)
        raise RecipeError(f"{place}: names no part; give one of {parts}, or int8 or nf4 for all")
    if isinstance(recipe.frozen_dtype, str) or recipe.train is None:
        return
    if "experts" in kinds and recipe.train.experts == "all":
        raise RecipeError(
            f"{places.of(('frozen_dtype', 'experts'))}: all experts train (train.experts), and "
            f"what trains is not quantised"
        )
    if "embeddings" in kinds and recipe.train.non_expert_modules:
        raise RecipeError(
            f"{places.of(('frozen_dtype', 'embeddings'))}: embeddings train "
            f"(train.non_expert_modules), and what trains is not quantised"
        )


def _check_rule(recipe: Recipe, spec: SelectionSpec, places: Places) -> None:
    """Check the rule now: profiling the model, which comes before its use, may take long."""
    try:
        rule = spec.rule()
        if recipe.method == "random":
            rule.setdefault("random", spec.seed)
        make_rule(**rule)
    except SelectionError as error:
        # It speaks of the options of `esft select`, which the recipe has as keys.
        text = re.sub(r"--([a-z-]+)", lambda option: option[1].replace("-", "_"), str(error))
        key = re.match(r"\w+", text)
        assert key is not None  # every message begins with the option
        raise RecipeError(f"{places.of(('selection', key[0]))}: {text}") from None

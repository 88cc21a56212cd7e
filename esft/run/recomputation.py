"""Gradient checkpointing: less memory, and what the backward pass needs is computed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from esft.errors import RecipeError

KEY = "gradient_checkpointing_kwargs"


def recompute_layers(model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Make a model's layers drop what their backward pass needs, and compute it again there.

    Only from the first layer that trains upwards: below it no gradient is asked for, so that
    nothing is kept there with or without this, and nothing is computed again. (transformers makes
    the embeddings' output ask for one, for the sake of torch's reentrant way; that is undone.)

    Args:
        model: a transformers model, or PEFT's wrapper of one, ready to train.
        options: as `gradient_checkpointing_kwargs` of `transformers.TrainingArguments`: those of
            `torch.utils.checkpoint.checkpoint`, `every_n_layers` and `offload`.

    Raises:
        RecipeError: the model's layers cannot be computed again, or `use_reentrant` is asked for.
    """
    chosen = dict(options or {})
    if chosen.pop("use_reentrant", False):
        raise RecipeError(
            f"training.{KEY}: use_reentrant: true computes no gradient for a layer whose input "
            f"needs none, as is so for the first one that trains; leave it out"
        )
    for_layers = ("every_n_layers", "offload")
    layers: dict[str, Any] = {key: chosen.pop(key) for key in for_layers if key in chosen}
    try:
        _enable(model, {"use_reentrant": False, **chosen}, layers)
    except ValueError as error:
        raise RecipeError(f"training.gradient_checkpointing: {error}") from error
    model.disable_input_require_grads()  # type: ignore[operator]


def _enable(model: Any, options: dict[str, Any], layers: dict[str, Any]) -> None:
    # transformers 5.23 renamed it.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **layers)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **layers)

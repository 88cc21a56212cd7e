"""Logits for the tokens that have a label, and for no others; and what each of them weighs.

Where only answers are supervised, the logits of prompts and padding serve nobody, yet in fp32 over
a vocabulary of 151,936 words each token's take 600 kB, and as much again for their gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from esft.data.example import IGNORED
from esft.errors import ModelError


@contextmanager
def labelled_logits(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a causal language model compute logits only where they enter the loss.

    The output layer gets the hidden states of the M tokens whose successor has a label, as one
    sequence; what the model does to logits afterwards (scaling, capping), and its loss function,
    work on each token by itself. The loss is the same. A model whose output layer or loss function
    is not the usual one gets the batch as it is.

    Where the batch has `loss_weights` `[B, S]`, the loss is `sum(w * nll) / n` over the labelled
    tokens, `n` the `num_items_in_batch` that the model is called with, or else `sum(w)`.

    Args:
        model: its forward passes unknown arguments on to its loss function.
        batch: its keyword arguments, with `labels` `[B, S]`.

    Yields:
        What to call the model with instead, inside the block; the output's logits are `[1, M, V]`.

    Raises:
        ModelError: there are weights, and this model cannot weigh; see `check_weighing`.
    """
    labels: Tensor | None = batch.get("labels")
    if "loss_weights" in batch:
        check_weighing(model)
    if labels is None or not _usual(model):
        yield dict(batch)
        return
    given = dict(batch)
    weights: Tensor | None = given.pop("loss_weights", None)
    target_T = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    kept_M = (target_T != IGNORED).nonzero().squeeze(1)
    given["shift_labels"] = target_T[kept_M][None]

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].flatten(0, -2)
        return (hidden.index_select(0, kept_M.to(hidden.device))[None], *args[1:])

    weighing = (
        nullcontext()
        if weights is None
        else _loss_function(model, _weighted(F.pad(weights, (0, 1))[:, 1:].flatten()[kept_M]))
    )
    handle = model.get_output_embeddings().register_forward_pre_hook(keep)  # type: ignore[operator]
    try:
        with weighing:
            yield given
    finally:
        handle.remove()


def check_weighing(model: nn.Module) -> None:
    """Make sure that a model's loss can be weighed token by token.

    Raises:
        ModelError: it computes its loss in a way of its own.
    """
    options = inspect.signature(_unwrapped(model).forward).parameters.values()
    if not _usual(model) or all(option.kind != option.VAR_KEYWORD for option in options):
        raise ModelError(
            f"{_unwrapped(model).config.model_type}: this family computes its loss in a way of its "
            f"own, which knows no weights of tokens; leave `weight` out of the rows, or make it 0 "
            f"or 1"
        )


def total_weight(batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the sum of the weights of all labelled tokens that something predicts."""
    sums = [
        batch["loss_weights"][:, 1:][batch["labels"][:, 1:] != IGNORED].sum(dtype=torch.float64)
        for batch in batches
    ]
    return torch.stack(sums).sum().float()


def _usual(model: nn.Module) -> bool:
    has_head = model.get_output_embeddings() is not None  # type: ignore[operator]
    return has_head and model.loss_function is ForCausalLMLoss


def _unwrapped(model: Any) -> Any:
    """Return the transformers model that PEFT may have wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _loss_function(model: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    owner = _unwrapped(model)
    usual = owner.loss_function
    owner.loss_function = function
    try:
        yield
    finally:
        owner.loss_function = usual


def _weighted(weight_M: Tensor) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        *,
        shift_labels: Tensor,
        **_: Any,
    ) -> Tensor:
        """As transformers' `ForCausalLMLoss` is called; fp32, as there."""
        target_M = shift_labels.view(-1).to(logits.device)
        nll_M = F.cross_entropy(logits.float().view(-1, vocab_size), target_M, reduction="none")
        weight = weight_M.to(nll_M)
        items = weight.sum() if num_items_in_batch is None else num_items_in_batch
        return (weight * nll_M).sum() / (items.to(nll_M) if torch.is_tensor(items) else items)

    return loss

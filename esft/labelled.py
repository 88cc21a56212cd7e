"""Logits for the tokens that have a label, and for no others.

Where only answers are supervised, the logits of prompts and padding serve nobody, yet in fp32 over
a vocabulary of 151,936 words each token's take 600 kB, and as much again for their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from esft.data.example import IGNORED


@contextmanager
def labelled_logits(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a causal language model compute logits only where they enter the loss.

    The output layer gets the hidden states of the M tokens whose successor has a label, as one
    sequence; what the model does to logits afterwards (scaling, capping), and its loss function,
    work on each token by itself. The loss is the same. A model whose output layer or loss function
    is not the usual one gets the batch as it is.

    Args:
        model: its forward passes unknown arguments on to its loss function.
        batch: its keyword arguments, with `labels` `[B, S]`.

    Yields:
        What to call the model with instead, inside the block; the output's logits are `[1, M, V]`.
    """
    labels: Tensor | None = batch.get("labels")
    head = model.get_output_embeddings()  # type: ignore[operator]
    usual = head is not None and model.loss_function is ForCausalLMLoss
    if labels is None or not usual:
        yield dict(batch)
        return
    target_T = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    kept_M = (target_T != IGNORED).nonzero().squeeze(1)

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].flatten(0, -2)
        return (hidden.index_select(0, kept_M.to(hidden.device))[None], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield {**batch, "shift_labels": target_T[kept_M][None]}
    finally:
        handle.remove()

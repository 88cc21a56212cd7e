"""Whether a model keeps the rows of a packed block apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esft.errors import ModelError

_ROW = 8  # tokens in each of the two rows tried; leaks reach the next token at least


def check_isolation(model: Any) -> None:
    """Make sure that packed rows cannot see each other in this model.

    Most families read from `position_ids` where a row starts. Some do not pass them to their
    attention mask (gpt-oss in transformers 5.23), and layers that are not attention, such as
    state-space layers and convolutions, carry on regardless. A list of families would be out of
    date soon, so the model is asked: two rows in one block, and the gradient of the second's
    logits with respect to the first's embeddings, which is exactly zero if, and only if, nothing
    of the first reaches the second.

    Args:
        model: a transformers causal language model, loaded; it and its gradients stay as they are.

    Raises:
        ModelError: the second row saw the first.
    """
    if _reaches_the_next_row(model):
        raise ModelError(
            f"{model.config.model_type}: this family does not keep packed rows apart in "
            f"transformers: a row would be trained to follow the row before it; set "
            f"data.packing: false"
        )


def _reaches_the_next_row(model: Any) -> bool:
    embedded: list[Tensor] = []

    def tap(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embeddings = model.get_input_embeddings()
    device = model.device
    ids = torch.arange(2 * _ROW, device=device).remainder(embeddings.num_embeddings)
    places = torch.arange(_ROW, device=device).repeat(2)
    was_training = model.training
    hook = embeddings.register_forward_hook(tap)
    model.eval()
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids[None], position_ids=places[None], use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, _ROW:].float().sum(), embedded[-1:])
    finally:
        hook.remove()
        model.train(was_training)
    return bool(gradient[0, :_ROW].any())

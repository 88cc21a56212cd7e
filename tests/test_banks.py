"""Trained weights that no token of a batch uses: they have a gradient, and it is zero."""

from __future__ import annotations

import pytest
import torch

import esft
from esft.moe import moe_layers
from esft.selection import Selection
from tests.models import EXPERTS, TOP_K, tiny

# Their own code computes one expert after the other, and leaves out those that no token chose.
ONE_BY_ONE = ("dbrx", "jetmoe", "longcat_flash")


@pytest.mark.parametrize("family", [*ONE_BY_ONE, "qwen3_moe"])
def test_an_expert_that_no_token_chooses_has_a_gradient_of_zeros(family: str) -> None:
    """One token chooses K of E; each expert in turn is all that trains."""
    model = tiny(family)
    layer = moe_layers(model)[-1].index
    ids = torch.tensor([[5, 9]])  # the last token has no label to learn and the first one is read
    used = 0
    for expert in range(EXPERTS):
        esft.attach(model, Selection({layer: [expert]}))
        model(input_ids=ids, labels=ids).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None for p in trained)
        used += any(bool(p.grad.any()) for p in trained if p.grad is not None)
        esft.detach(model)
    assert 0 < used <= TOP_K

"""Attention on a GPU keeps no scores of all tokens with all, also where values are narrower."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from esft.plans.contents import known
from esft.plans.pretence import pretending

B, A, S, D, V = 2, 4, 256, 48, 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scores_are_in_memory_on_a_cpu_only(device: str) -> None:
    usual = F.scaled_dot_product_attention
    with pretending() as tracker, known(0.0, device), torch.no_grad():
        query, key = torch.empty(2, B, A, S, D).unbind()
        value = torch.empty(B, A, S, V)
        tracker.reset()
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert out.shape == value.shape
        assert (tracker.peak - 4 * B * A * S * (2 * D + V) > 4 * B * A * S * S) == (device == "cpu")
    assert F.scaled_dot_product_attention is usual

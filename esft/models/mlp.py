"""A feed-forward network without routing."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN


class GatedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))`, arXiv 2002.05202.

    Args:
        hidden_size: H.
        intermediate_size: I.
        hidden_act: transformers' name of the activation.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, `[..., H]`."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y

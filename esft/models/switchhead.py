"""SwitchHead attention (arXiv 2312.07987) as MoEUT has it: routed values and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esft.models.attention import attend
from esft.models.projection import ProjectionExperts
from esft.models.rotary import Angles, rotate
from esft.models.router import router_logits


class HeadRouter(nn.Module):
    """Chooses for each head the k of its own experts whose sigmoid is highest, and weighs by it.

    Args:
        hidden_size: H.
        heads: A.
        experts: of each head, E/A.
        top_k: k, of each head.
    """

    def __init__(self, hidden_size: int, heads: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.heads, self.experts, self.each = heads, experts, top_k
        self.top_k = heads * top_k  # of all heads together, as scores count them
        self.weight = nn.Parameter(torch.empty(heads * experts, hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[T, E]`, and weights and expert ids head by head, `[T, A * k]`."""
        logits_TE = router_logits(x_TH, self.weight)
        score_TAE = logits_TE.unflatten(-1, (self.heads, self.experts)).sigmoid()
        weight_TAK, index_TAK = score_TAE.topk(self.each, dim=-1)
        first = torch.arange(0, self.heads * self.experts, self.experts, device=x_TH.device)
        index_TAK = index_TAK + first[:, None]
        return logits_TE, weight_TAK.flatten(1).to(x_TH.dtype), index_TAK.flatten(1)


class RoutedProjection(nn.Module):
    """A router and its experts.

    Args:
        config: of the model.
        in_features: of each expert.
        out_features: of each expert.
        sums_heads: see `ProjectionExperts`.
    """

    def __init__(self, config: Any, in_features: int, out_features: int, sums_heads: bool) -> None:
        super().__init__()
        heads, experts = config.num_attention_heads, config.attention_num_experts
        self.router = HeadRouter(
            config.hidden_size, heads, experts, config.attention_num_experts_per_tok
        )
        self.experts = ProjectionExperts(
            heads, heads * experts, in_features, out_features, sums_heads
        )

    def forward(self, x_TAD: Tensor, chosen_by_TH: Tensor) -> Tensor:
        """Return `[T, A, out]` or `[T, out]`; see `ProjectionExperts.forward`.

        Args:
            x_TAD: what is projected.
            chosen_by_TH: what the router sees.
        """
        _, weight_TK, index_TK = self.router(chosen_by_TH)
        y: Tensor = self.experts(x_TAD, index_TK, weight_TK)
        return y


class SwitchHead(nn.Module):
    """Attention with a routed projection for the values and one for the output of each head.

    Queries, keys and routers see the normed input, values are made of the input itself: see
    `esft.models.moeut`.

    Args:
        config: of the model.
    """

    num_key_value_groups = 1

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.is_causal = True
        self.head_dim = config.head_dim
        H, A, D = config.hidden_size, config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(H, A * D, bias=False)
        self.k_proj = nn.Linear(H, A * D, bias=False)
        self.value = RoutedProjection(config, H, D, sums_heads=False)
        self.output = RoutedProjection(config, D, H, sums_heads=True)

    def forward(
        self,
        x_BSH: Tensor,
        normed_BSH: Tensor,
        angles: Angles,
        mask: Tensor | None,
        cache: Any = None,
        place: int = 0,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, S, H]`, and the probabilities if the implementation gives them.

        Args:
            x_BSH: what values are made of.
            normed_BSH: what queries, keys and choices are made of.
            angles: see `esft.models.attention.Attention.forward`, and so for the others.
            mask: as the attention implementation takes it.
            cache: keys and values of the tokens before; gets these tokens' too.
            place: the layer's own in the cache.
            options: for the attention implementation.
        """
        B, S, _ = x_BSH.shape
        normed_TH = normed_BSH.flatten(0, 1)
        query, key = (
            rotate(linear(normed_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), angles)
            for linear in (self.q_proj, self.k_proj)
        )
        value_TAD = self.value(x_BSH.flatten(0, 1)[:, None], normed_TH)
        value = value_TAD.unflatten(0, (B, S)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, place)
        out, probabilities = attend(
            self, query, key, value, mask, scaling=self.head_dim**-0.5, **options
        )
        y_TH = self.output(out.flatten(0, 1), normed_TH)
        return y_TH.unflatten(0, (B, S)), probabilities

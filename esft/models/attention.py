"""Causal self-attention with rotary positions and grouped queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from esft.models.rotary import Angles, rotate


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Return `cap * tanh(x / cap)`: x where it is small, never beyond the cap. None caps nothing.

    As Gemma 2 has it (arXiv 2408.00118).
    """
    return x if cap is None else cap * torch.tanh(x / cap)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend. Signature of transformers' attention interface.

    Args:
        module: has `num_key_value_groups`, the query heads that share a key head.
        query: `[B, heads, Q, D]`.
        key: `[B, key heads, S, D]`.
        value: `[B, key heads, S, D]`.
        attention_mask: added to the logits, `[B, 1, Q, S]`.
        scaling: factor of the logits.
        softcap: see `esft.models.attention.softcap`; before the mask.

    Returns:
        the output `[B, Q, heads, D]`, and the probabilities `[B, heads, Q, S]`.
    """
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    logits = _softcap(query @ key.transpose(-1, -2) * scaling, softcap)
    if attention_mask is not None:
        logits = logits + attention_mask
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits.softmax(dim=-1, dtype=wide).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


_softcap = softcap  # the interface has an argument of that name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    cap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the implementation that the config asks for; see `plain_attention`."""
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, plain_attention)
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask, scaling=scaling, softcap=cap, **options
    )
    return result


class Attention(nn.Module):
    """Multi-head attention, keys and values shared by groups of query heads (arXiv 2305.13245).

    Args:
        config: of the model: `hidden_size`, `num_attention_heads`, `num_key_value_heads`,
            `head_dim`, `attention_scaling` (factor of the logits), and `attn_logit_softcapping`
            where logits are capped.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        self.cap = getattr(config, "attn_logit_softcapping", None)
        H, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(H, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(H, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(H, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, H, bias=False)

    def forward(
        self,
        x_BSH: Tensor,
        angles: Angles,
        mask: Tensor | None,
        cache: Any = None,
        place: int = 0,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output `[B, S, H]`, and the probabilities if the implementation gives them.

        Args:
            x_BSH: `[B, S, H]`.
            angles: of the tokens' positions.
            mask: as the attention implementation takes it.
            cache: keys and values of the tokens before; gets these tokens' too.
            place: the layer's own in the cache.
            options: for the attention implementation.
        """
        query, key, value = (
            linear(x_BSH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, angles), rotate(key, angles)
        if cache is not None:
            key, value = cache.update(key, value, place)
        out, probabilities = attend(
            self,
            query,
            key,
            value,
            mask,
            scaling=self.config.attention_scaling,
            cap=self.cap,
            **options,
        )
        return self.o_proj(out.flatten(2)), probabilities

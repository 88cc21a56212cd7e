"""Grok-1: the released model of xAI (github.com/xai-org/grok-1, `model.py` and `run.py`).

No family of transformers computes it. What is its own: a norm before and after each block, the
second inside the residual branch, together with a cap on attention logits; gate values that are
plain probabilities of the softmax over all experts, not divided by their sum; constant factors on
embeddings and output logits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.output_capturing import OutputRecorder

from esft.models.attention import Attention, softcap
from esft.models.decoder import Decoder, DecoderForCausalLM, DecoderLayer, MoePreTrainedModel
from esft.models.experts import GatedExperts
from esft.models.losses import load_balance_loss
from esft.models.rotary import Angles
from esft.models.router import router_logits


class Grok1Config(PreTrainedConfig):
    """Configuration; the defaults are those of the released model.

    Attributes:
        intermediate_size: of one expert.
        attention_scaling: factor of the attention logits; `head_dim ** -0.5` as released.
        attn_logit_softcapping: attention logits are capped to this by tanh; None: not at all.
        final_logit_softcapping: the same for output logits; the released model has no such cap.
        embedding_multiplier: factor of the embeddings; `hidden_size ** 0.5` as released.
        output_multiplier: factor of the output logits.
        router_aux_loss_coef: of the load balance loss, added where `output_router_logits` is on.
    """

    model_type = "grok1"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "gelu_pytorch_tanh"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_scaling: float = 128**-0.5
    attn_logit_softcapping: float | None = 30.0
    final_logit_softcapping: float | None = None
    embedding_multiplier: float = 6144**0.5
    output_multiplier: float = 3**-0.5
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated: all."""
        return self.head_dim


class Grok1Router(nn.Module):
    """Softmax over all experts, then top-K; the K probabilities are not divided by their sum.

    Args:
        config: of the model.
    """

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[T, E]`, weights `[T, K]` and expert ids `[T, K]`; in fp32 at least."""
        logits_TE = router_logits(x_TH, self.weight)
        weight_TK, index_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weight_TK.to(x_TH.dtype), index_TK


class Grok1MoeBlock(nn.Module):
    """Router and GELU-gated experts.

    Args:
        config: of the model.
    """

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.gate = Grok1Router(config)
        self.experts = GatedExperts(
            config,
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
        )

    def forward(self, x_BSH: Tensor) -> Tensor:
        """Return `[B, S, H]`."""
        x_TH = x_BSH.flatten(0, 1)
        _, weight_TK, index_TK = self.gate(x_TH)
        y_TH: Tensor = self.experts(x_TH, index_TK, weight_TK)
        return y_TH.view_as(x_BSH)


class Grok1Layer(DecoderLayer):
    """Attention and experts, each between two norms in its residual branch.

    Args:
        config: of the model.
    """

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Grok1MoeBlock(config)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            self.add_module(f"{name}_norm", nn.RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self,
        x_BSH: Tensor,
        angles: Angles,
        mask: Tensor | None,
        counted_BS: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return `[B, S, H]`; arguments as `DecoderLayer` says."""
        attended, _ = self.self_attn(self.input_norm(x_BSH), angles, mask, **options)
        x_BSH = x_BSH + self.post_attention_norm(attended)
        return x_BSH + self.post_feedforward_norm(self.mlp(self.pre_feedforward_norm(x_BSH)))


class Grok1PreTrainedModel(MoePreTrainedModel):
    """What both classes share."""

    config: Grok1Config
    config_class = Grok1Config
    _no_split_modules: ClassVar = ["Grok1Layer"]
    _supports_sdpa = False  # it cannot cap logits
    _can_record_outputs: ClassVar = {
        "router_logits": OutputRecorder(Grok1Router, index=0),
        "hidden_states": Grok1Layer,
        "attentions": Attention,
    }
    routers = (Grok1Router,)


class Grok1Model(Grok1PreTrainedModel, Decoder):
    """The decoder."""

    def make_layer(self, number: int) -> Grok1Layer:
        """See `Decoder.make_layer`."""
        return Grok1Layer(self.config)

    def scale_embeddings(self, x_BSH: Tensor) -> Tensor:
        """See `Decoder.scale_embeddings`."""
        return x_BSH * self.config.embedding_multiplier


class Grok1ForCausalLM(Grok1PreTrainedModel, DecoderForCausalLM):
    """The language model."""

    decoder = Grok1Model

    def scale_logits(self, logits: Tensor) -> Tensor:
        """See `DecoderForCausalLM.scale_logits`."""
        return softcap(logits * self.config.output_multiplier, self.config.final_logit_softcapping)

    def router_loss(self, outputs: Any, counted_BS: Tensor | None) -> Tensor:
        """See `DecoderForCausalLM.router_loss`."""
        balance = load_balance_loss(
            outputs.router_logits, self.config.num_experts_per_tok, counted_BS
        )
        return self.config.router_aux_loss_coef * balance

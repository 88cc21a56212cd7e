"""OpenMoE (arXiv 2402.01739), and ST-MoE (arXiv 2202.08906) as a decoder.

No family of transformers computes them: a decoder in which every n-th layer is an MoE layer, whose
experts take a limited number of tokens and whose router is trained with a z-loss.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.output_capturing import OutputRecorder

from esft.models.attention import Attention
from esft.models.capacity import within_capacity
from esft.models.decoder import Decoder, DecoderForCausalLM, DecoderLayer, MoePreTrainedModel
from esft.models.experts import GatedExperts
from esft.models.losses import load_balance_loss, router_z_loss
from esft.models.mlp import GatedMlp
from esft.models.rotary import Angles
from esft.models.router import router_logits


class OpenMoeConfig(PreTrainedConfig):
    """Configuration; the defaults are OpenMoE-8B's.

    A decoder after ST-MoE has `moe_layer_interval=4`, `hidden_act="gelu"`, `norm_topk_prob=True`
    and `router_z_loss_coef=0.001`.

    Attributes:
        intermediate_size: of one expert, and of a feed-forward network without routing.
        moe_layer_interval: every n-th layer is an MoE layer, the last of each n.
        extra_mlp: whether an MoE layer has a feed-forward network without routing after it.
        norm_topk_prob: whether a token's K gate values are divided by their sum.
        attention_scaling: factor of the attention logits; 1 as in T5.
        capacity_factor: in training an expert takes `ceil(factor * K * n / E)` of a row's n
            tokens; what is dropped passes through the residual alone. None: experts take all.
        eval_capacity_factor: the same outside training, None by default: dropping lets a token see
            later ones and the number of tokens, so that decoding would not equal training. ST-MoE
            evaluates with 2.
        min_capacity: an expert takes this many tokens of a row at least.
        router_aux_loss_coef: of the load balance loss, added where `output_router_logits` is on.
        router_z_loss_coef: of the z-loss, likewise.
    """

    model_type = "openmoe"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 256384
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    num_key_value_heads: int = 24
    head_dim: int = 128
    hidden_act: str = "silu"
    num_experts: int = 32
    num_experts_per_tok: int = 2
    moe_layer_interval: int = 6
    extra_mlp: bool = True
    norm_topk_prob: bool = False
    capacity_factor: float | None = 1.25
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    attention_scaling: float = 1.0
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0001
    output_router_logits: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated: all."""
        return self.head_dim


class OpenMoeRouter(nn.Module):
    """Softmax over all experts, top-K, and what is beyond an expert's capacity gets weight 0.

    Args:
        config: of the model.
    """

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.factors = {True: config.capacity_factor, False: config.eval_capacity_factor}
        self.min_capacity = config.min_capacity
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(
        self, x_BSH: Tensor, counted_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[T, E]`, weights `[T, K]` and expert ids `[T, K]`; in fp32 at least."""
        logits = router_logits(x_BSH, self.weight)
        weight, index = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalise:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        factor = self.factors[self.training]
        if factor is not None:
            E = self.weight.shape[0]
            weight = weight * within_capacity(index, E, factor, self.min_capacity, counted_BS)
        return (
            logits.flatten(0, 1),
            weight.flatten(0, 1).to(x_BSH.dtype),
            index.flatten(0, 1),
        )


class OpenMoeBlock(nn.Module):
    """Router and gated experts.

    Args:
        config: of the model.
    """

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.gate = OpenMoeRouter(config)
        self.experts = GatedExperts(
            config,
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
        )

    def forward(self, x_BSH: Tensor, counted_BS: Tensor | None) -> Tensor:
        """Return `[B, S, H]`: 0 for a token all of whose choices were dropped."""
        _, weight_TK, index_TK = self.gate(x_BSH, counted_BS)
        y_TH: Tensor = self.experts(x_BSH.flatten(0, 1), index_TK, weight_TK)
        return y_TH.view_as(x_BSH)


class OpenMoeLayer(DecoderLayer):
    """Attention, then a feed-forward network; in an MoE layer experts, then one without routing.

    Args:
        config: of the model.
        sparse: whether it is an MoE layer.
    """

    def __init__(self, config: OpenMoeConfig, sparse: bool) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        dense = (H, config.intermediate_size, config.hidden_act)
        self.sparse, self.extra = sparse, sparse and config.extra_mlp
        self.input_norm = nn.RMSNorm(H, eps)
        self.self_attn = Attention(config)
        self.post_attention_norm = nn.RMSNorm(H, eps)
        self.mlp = OpenMoeBlock(config) if sparse else GatedMlp(*dense)
        if self.extra:
            self.pre_extra_norm = nn.RMSNorm(H, eps)
            self.extra_mlp = GatedMlp(*dense)

    def forward(
        self,
        x_BSH: Tensor,
        angles: Angles,
        mask: Tensor | None,
        counted_BS: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return `[B, S, H]`; arguments as `DecoderLayer` says."""
        x_BSH = x_BSH + self.self_attn(self.input_norm(x_BSH), angles, mask, **options)[0]
        y_BSH = self.post_attention_norm(x_BSH)
        x_BSH = x_BSH + (self.mlp(y_BSH, counted_BS) if self.sparse else self.mlp(y_BSH))
        if self.extra:
            x_BSH = x_BSH + self.extra_mlp(self.pre_extra_norm(x_BSH))
        return x_BSH


class OpenMoePreTrainedModel(MoePreTrainedModel):
    """What both classes share."""

    config: OpenMoeConfig
    config_class = OpenMoeConfig
    _no_split_modules: ClassVar = ["OpenMoeLayer"]
    _can_record_outputs: ClassVar = {
        "router_logits": OutputRecorder(OpenMoeRouter, index=0),
        "hidden_states": OpenMoeLayer,
        "attentions": Attention,
    }
    routers = (OpenMoeRouter,)


class OpenMoeModel(OpenMoePreTrainedModel, Decoder):
    """The decoder."""

    def make_layer(self, number: int) -> OpenMoeLayer:
        """See `Decoder.make_layer`."""
        return OpenMoeLayer(self.config, (number + 1) % self.config.moe_layer_interval == 0)


class OpenMoeForCausalLM(OpenMoePreTrainedModel, DecoderForCausalLM):
    """The language model."""

    decoder = OpenMoeModel

    def router_loss(self, outputs: Any, counted_BS: Tensor | None) -> Tensor:
        """See `DecoderForCausalLM.router_loss`."""
        config, logits = self.config, outputs.router_logits
        balance = load_balance_loss(logits, config.num_experts_per_tok, counted_BS)
        z_loss = router_z_loss(logits, counted_BS)
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z_loss

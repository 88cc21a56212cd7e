"""MoEUT: Mixture-of-Experts Universal Transformer (arXiv 2405.16039).

A group of layers runs again and again, A-B-A-B, with the same weights each time. Feed-forward
networks are sigma-MoE (arXiv 2310.10837), attention is SwitchHead (arXiv 2312.07987). Norms stand
around the layers ("peri-layernorm"): only before what a sigmoid or softmax follows, that is
queries, keys, routers and the output layer; values and experts get the residual stream as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from esft.models.decoder import Decoder, DecoderForCausalLM, DecoderLayer, MoePreTrainedModel
from esft.models.experts import PlainExperts
from esft.models.losses import usage_entropy
from esft.models.projection import ProjectionExperts
from esft.models.rotary import Angles
from esft.models.router import router_logits
from esft.models.switchhead import HeadRouter, SwitchHead


class MoeutConfig(PreTrainedConfig):
    """Configuration; the defaults are those of the paper's model of 244 million parameters.

    Attributes:
        num_hidden_layers: how many layers run, those with the same weights counted each time.
        group_size: how many layers have weights of their own; divides `num_hidden_layers`.
        moe_intermediate_size: of one feed-forward expert.
        attention_num_experts: of each head, for the values and again for the outputs.
        attention_num_experts_per_tok: chosen of these.
        rotary_fraction: share of a head's channels that are rotated, the first ones.
        entropy_coef: of the feed-forward routers' entropy regulariser, added where
            `output_router_logits` is on.
        attention_entropy_coef: the same for the attention's routers.
    """

    model_type = "moeut"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 8000
    hidden_size: int = 1024
    num_hidden_layers: int = 18
    group_size: int = 2
    num_attention_heads: int = 4
    head_dim: int = 128
    num_experts: int = 387
    num_experts_per_tok: int = 16
    moe_intermediate_size: int = 128
    hidden_act: str = "relu"
    attention_num_experts: int = 10
    attention_num_experts_per_tok: int = 2
    rotary_fraction: float = 0.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024
    layer_norm_eps: float = 1e-5
    entropy_coef: float = 0.01
    attention_entropy_coef: float = 0.001
    output_router_logits: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_hidden_layers % self.group_size:
            raise ValueError(
                f"num_hidden_layers {self.num_hidden_layers} is no multiple of group_size "
                f"{self.group_size}"
            )

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head are rotated."""
        return int(self.rotary_fraction * self.head_dim)


class SigmaRouter(nn.Module):
    """Chooses the K experts whose sigmoid is highest, and weighs by it as it is.

    Args:
        config: of the model.
    """

    def __init__(self, config: MoeutConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits `[T, E]`, weights `[T, K]` and expert ids `[T, K]`; in fp32 at least."""
        logits_TE = router_logits(x_TH, self.weight)
        weight_TK, index_TK = logits_TE.sigmoid().topk(self.top_k, dim=-1)
        return logits_TE, weight_TK.to(x_TH.dtype), index_TK


class SigmaMoe(nn.Module):
    """Router and two-matrix experts.

    Args:
        config: of the model.
    """

    def __init__(self, config: MoeutConfig) -> None:
        super().__init__()
        self.gate = SigmaRouter(config)
        self.experts = PlainExperts(
            config,
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
            config.hidden_act,
        )

    def forward(self, x_BSH: Tensor, normed_BSH: Tensor) -> Tensor:
        """Return `[B, S, H]`; the router sees the normed input, the experts the other."""
        _, weight_TK, index_TK = self.gate(normed_BSH.flatten(0, 1))
        y_TH: Tensor = self.experts(x_BSH.flatten(0, 1), index_TK, weight_TK)
        return y_TH.view_as(x_BSH)


class MoeutLayer(DecoderLayer):
    """SwitchHead, then sigma-MoE.

    Args:
        config: of the model.
    """

    def __init__(self, config: MoeutConfig) -> None:
        super().__init__()
        # First, so that esft numbers the feed-forward experts before those of the attention.
        self.mlp = SigmaMoe(config)
        self.self_attn = SwitchHead(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self,
        x_BSH: Tensor,
        angles: Angles,
        mask: Tensor | None,
        counted_BS: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return `[B, S, H]`; arguments as `DecoderLayer` says."""
        normed_BSH = self.attention_norm(x_BSH)
        x_BSH = x_BSH + self.self_attn(x_BSH, normed_BSH, angles, mask, **options)[0]
        return x_BSH + self.mlp(x_BSH, self.mlp_norm(x_BSH))


class MoeutPreTrainedModel(MoePreTrainedModel):
    """What both classes share."""

    config: MoeutConfig
    config_class = MoeutConfig
    _no_split_modules: ClassVar = ["MoeutLayer"]
    # Three a layer each time it runs: of the values, the outputs, the feed-forward experts.
    _can_record_outputs: ClassVar = {
        "router_logits": [
            OutputRecorder(HeadRouter, index=0),
            OutputRecorder(SigmaRouter, index=0),
        ],
        "hidden_states": MoeutLayer,
        "attentions": SwitchHead,
    }
    routers = (SigmaRouter, HeadRouter)

    def init_own(self, module: nn.Module) -> None:
        """See `MoePreTrainedModel.init_own`.

        What a layer adds shrinks with the depth; a router's rows all have the same length.
        Standard deviations are `sqrt(2 / layers)` over the root of the inputs' number, where the
        inputs of a sum over experts or heads are all of them together, as the authors' code has it
        (github.com/RobertCsordas/moeut).
        """
        config = self.config
        H, A, D = config.hidden_size, config.num_attention_heads, config.head_dim
        spread = math.sqrt(2 / config.num_hidden_layers)
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=H**-0.5)
        elif isinstance(module, self.routers):
            row = torch.empty_like(module.weight).normal_()
            row = row / row.norm(dim=-1, keepdim=True)
            init.copy_(module.weight, row * (spread * H**-0.5 / row.std()))
        elif isinstance(module, PlainExperts):
            inner = config.num_experts * config.moe_intermediate_size
            init.normal_(module.up_proj, std=spread * H**-0.5)
            init.normal_(module.down_proj, std=spread * inner**-0.5)
        elif isinstance(module, ProjectionExperts):
            inputs = A * D if module.sums_heads else H
            init.normal_(module.weight, std=spread * inputs**-0.5)
        elif isinstance(module, nn.Linear):
            # The output layer, which alone has a bias, as PyTorch does it; queries and keys.
            init.normal_(module.weight, std=(spread if module.bias is None else 3**-0.5) * H**-0.5)


class MoeutModel(MoeutPreTrainedModel, Decoder):
    """The decoder."""

    layer_count = "group_size"

    def make_layer(self, number: int) -> MoeutLayer:
        """See `Decoder.make_layer`."""
        return MoeutLayer(self.config)

    def make_norm(self) -> nn.LayerNorm:
        """See `Decoder.make_norm`."""
        return nn.LayerNorm(self.config.hidden_size, self.config.layer_norm_eps)

    def steps(self) -> Iterator[nn.Module]:
        """See `Decoder.steps`: the group as often as the depth asks for."""
        for _ in range(self.config.num_hidden_layers // self.config.group_size):
            yield from self.layers


class MoeutForCausalLM(MoeutPreTrainedModel, DecoderForCausalLM):
    """The language model."""

    decoder = MoeutModel
    head_bias = True

    def router_loss(self, outputs: Any, counted_BS: Tensor | None) -> Tensor:
        """See `DecoderForCausalLM.router_loss`: the negative entropies, summed over the group."""
        config = self.config
        B, S, _ = outputs.last_hidden_state.shape
        each = 3 * config.group_size
        loss = outputs.last_hidden_state.new_zeros((), dtype=torch.float32)
        for place in range(each):
            logits = [x_TE.unflatten(0, (B, S)) for x_TE in outputs.router_logits[place::each]]
            coefficient = config.entropy_coef
            if place % 3 < 2:
                logits = [x.unflatten(-1, (config.num_attention_heads, -1)) for x in logits]
                coefficient = config.attention_entropy_coef
            loss = loss - coefficient * usage_entropy(logits, counted_BS)
        return loss

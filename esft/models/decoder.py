"""What the models here share: a decoder of MoE layers, and the language model around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from esft.models.experts import GatedExperts, PlainExperts
from esft.models.rotary import rotary_angles


class MoePreTrainedModel(PreTrainedModel):
    """What transformers asks of a model's classes."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    routers: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Classes of the modules that choose experts."""

    # transformers looks for these interfaces in the source of the file that has the class, and
    # would fall back to loops; here they are used in other files.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        self.init_own(module)

    def init_own(self, module: nn.Module) -> None:
        """Give a module its initial values where they are not those that transformers gives."""
        if isinstance(module, (GatedExperts, PlainExperts, *self.routers)):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, std=self.config.initializer_range)


class DecoderLayer(GradientCheckpointingLayer):
    """One layer: `layer(x_BSH, angles, mask, cache, place, counted_BS, ...) -> [B, S, H]`.

    `place` is the layer's own in the cache, `counted_BS` is 0 for padding (None if there is none);
    the others are as for `esft.models.attention.Attention`. The first argument alone may need a
    gradient: it is given by position, for gradient checkpointing.
    """


class Decoder(MoePreTrainedModel):
    """Embedding, layers and the final norm.

    Args:
        config: of the model.
    """

    layer_count: ClassVar[str] = "num_hidden_layers"
    """The configuration's name for how many layers have weights of their own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        H = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, H, config.pad_token_id)
        count = getattr(config, self.layer_count)
        self.layers = nn.ModuleList(self.make_layer(number) for number in range(count))
        self.norm = self.make_norm()
        self.gradient_checkpointing = False
        self.post_init()

    def make_layer(self, number: int) -> DecoderLayer:
        """Return the layer of a number from 0 on, with new weights."""
        raise NotImplementedError

    def make_norm(self) -> nn.Module:
        """Return the final norm."""
        return nn.RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)

    def scale_embeddings(self, x_BSH: Tensor) -> Tensor:
        """Return the first layer's input for the tokens' embeddings."""
        return x_BSH

    def steps(self) -> Iterator[nn.Module]:
        """Yield the layers in the order in which they run."""
        yield from self.layers

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder, with transformers' arguments and outputs.

        Args:
            input_ids: `[B, S]`.
            attention_mask: 0 for padding, `[B, S]`, or `[B, cached + S]` with a cache.
            position_ids: `[B, S]`; where they start over, so does a packed row.
            past_key_values: the cache of the tokens before.
            inputs_embeds: `[B, S, H]`, instead of `input_ids`.
            use_cache: whether to return a cache.
            options: `output_router_logits`, `output_hidden_states`, `output_attentions`, and
                whatever the attention implementation takes.

        Raises:
            ValueError: there is neither `input_ids` nor `inputs_embeds`, or there are both.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        S = inputs_embeds.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + S, device=inputs_embeds.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        x_BSH = self.scale_embeddings(inputs_embeds)
        angles = rotary_angles(
            position_ids, self.config.rotary_dim, self.config.rope_theta, x_BSH.dtype
        )
        for place, layer in enumerate(self.steps()):
            x_BSH = layer(
                x_BSH,
                angles=angles,
                mask=mask,
                cache=past_key_values,
                place=place,
                counted_BS=counted(attention_mask, S),
                position_ids=position_ids,
                **options,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(x_BSH), past_key_values=past_key_values
        )


class DecoderForCausalLM(MoePreTrainedModel, GenerationMixin):
    """A decoder with an output layer.

    Args:
        config: of the model.
    """

    decoder: ClassVar[type[Decoder]]
    head_bias: ClassVar[bool] = False
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.head_bias)
        self.post_init()

    def scale_logits(self, logits: Tensor) -> Tensor:
        """Return the model's logits for those of the output layer."""
        return logits

    def router_loss(self, outputs: Any, counted_BS: Tensor | None) -> Tensor:
        """Return what is added to the loss, weighted.

        Args:
            outputs: of the decoder, with the routers' logits.
            counted_BS: 0 for padding; None if there is none.
        """
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the language model, with transformers' arguments and outputs.

        Args:
            input_ids: `[B, S]`.
            attention_mask: see `Decoder.forward`, and so for those not named here.
            position_ids: `[B, S]`.
            past_key_values: the cache of the tokens before.
            inputs_embeds: `[B, S, H]`, instead of `input_ids`.
            labels: `[B, S]`, -100 where no loss is wanted; shifted here.
            use_cache: whether to return a cache.
            output_router_logits: whether to return the routers' logits, and to add the routers'
                loss to the loss; None asks the config.
            logits_to_keep: how many tokens from the last on get logits, or which; 0 is all.
            options: for the decoder and the loss function.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **options,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.scale_logits(self.lm_head(hidden[:, kept]))
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **options)
        if output_router_logits:
            aux_loss = self.router_loss(outputs, counted(attention_mask, hidden.shape[1]))
            if loss is not None:
                loss = loss + aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def counted(attention_mask: Tensor | None, S: int) -> Tensor | None:
    """Return which of the S tokens at hand are not padding, `[B, S]`; None if all are.

    Args:
        attention_mask: `[B, cached + S]`; a mask of other dimensions does not tell of padding.
        S: tokens at hand.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -S:]

"""Tiny random models that read images too, whose language model has routed experts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.models import EXPERTS, HIDDEN, INNER, LAYERS, TOP_K, VOCAB

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "head_dim": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "out_hidden_size": HIDDEN,
}
_ROTARY: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
# Family -> what its two configurations need besides the sizes.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": (
        {"model_type": "aria_text", "moe_num_shared_experts": 1},
        {"model_type": "idefics3_vision"},
    ),
    "glm4v_moe": (
        {
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 2,
            "topk_group": 1,
            "rope_parameters": _ROTARY | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
        {},
    ),
    "llama4": (
        {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "qwen3_vl_moe": (
        {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}},
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}


def wrapper(family: str, **text: Any) -> PreTrainedModel:
    """Return a random fp32 model in evaluation mode; `text` changes its language model's sizes."""
    own, vision = WRAPPERS[family]
    config = AutoConfig.for_model(
        family, text_config=_TEXT | own | text, vision_config=_VISION | vision
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model

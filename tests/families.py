"""A tiny configuration of every family of transformers whose experts esft can address."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import EXPERTS, HIDDEN, INNER, LAYERS, TOP_K, VOCAB

# Every spelling of the same sizes; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
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
    "moe_k": TOP_K,
    "moe_topk": TOP_K,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
}
SCALED: dict[str, Any] = {"routed_scaling_factor": 2.5, "n_group": 2, "topk_group": 1}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 20}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
LATENT: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    **SCALED,
}
# Family -> what its configuration needs besides the sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "route_scale": 2.5},
    "aria_text": {"moe_num_shared_experts": 1},
    "cohere2_moe": {},
    "deepseek_v2": LATENT | {"q_lora_rank": None},
    "deepseek_v3": LATENT | {"head_dim": 8},
    "dots1": {"first_k_dense_replace": 1, **SCALED},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    "exaone_moe": SCALED,
    "flex_olmo": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe": {"first_k_dense_replace": 1, **SCALED},
    "glm4_moe_lite": LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], **_MAMBA},
    "granitemoeshared": {"shared_intermediate_size": 20},
    "hunyuan_v1_moe": {},
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {"layers_block_type": ["attention", "moe", "moe"], **SCALED},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": SHARED,
    "qwen3_5_moe_text": SHARED | LINEAR,
    "qwen3_moe": {},
    "qwen3_next": SHARED | LINEAR,
    "solar_open": SCALED,
}


def small(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a random bf16 model of any family of `CONFIGS`: 3 layers, 8 experts, top-2.

    Every parameter is random, no two experts are alike. Only its shape and its names are meant
    to be used; for models that compute see `tests.models`.
    """
    config = AutoConfig.for_model(family, **(SIZES | CONFIGS.get(family, {}) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return model

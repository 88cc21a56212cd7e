"""Tiny random models for tests, one per family; their routers do not send all tokens one way.

No side of an expert's matrices equals another (H, I, 2I): where they are swapped, it must not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# The four families that the issue asks for; every test over families runs through these.
FAMILIES = ("deepseek_v2", "qwen3_moe", "mixtral", "olmoe")

VOCAB, HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 64, 32, 24, 8, 2, 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_FAMILY: dict[str, dict[str, Any]] = {
    # Multi-head latent attention, kept small; the first layer is dense, as in the real ones.
    "deepseek_v2": {
        "intermediate_size": 48,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
    },
    "mixtral": {"intermediate_size": INNER, "num_local_experts": EXPERTS},
    # Not among `FAMILIES`: layouts that differ on disk (fused) or in memory (transposed, biases).
    "gpt_oss": {"head_dim": 16, "intermediate_size": INNER, "num_local_experts": EXPERTS},
    "granitemoe": {"intermediate_size": INNER, "num_local_experts": EXPERTS},
    # A shared expert; routers of DeepSeek-V3's kind.
    "glm4_moe": {
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    # Experts without a gate.
    "nemotron_h": {
        "layers_block_type": ["attention", "moe", "moe"],
        "head_dim": 16,
        "moe_intermediate_size": INNER,
        "moe_shared_expert_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "olmoe": {"intermediate_size": INNER, "num_experts": EXPERTS, "norm_topk_prob": False},
    # Outside the experts interface.
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 2,
        "n_layers": LAYERS,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INNER,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "jetmoe": {"kv_channels": 16, "intermediate_size": INNER, "num_local_experts": EXPERTS},
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size": INNER,
        "intermediate_size_mlp": 48,
        "num_local_experts": EXPERTS,
        "interleave_moe_layer_step": 1,
    },
    "longcat_flash": {
        "num_hidden_layers": 2 * LAYERS,  # two attentions each
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": INNER,
        "n_routed_experts": EXPERTS,
        "zero_expert_num": 4,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "head_dim": 8,
        "v_head_dim": 16,
    },
}


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random fp32 model in evaluation mode: 3 layers, 8 experts, top-2, hidden 32.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights; the same seed gives the same bits, and the caller's random state
            is left alone.
        overrides: fields of the family's configuration.
    """
    config = AutoConfig.for_model(family, **(_COMMON | _FAMILY[family] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # The default spread of 0.02 makes all experts equally likely, and DeepSeek's routers are
        # not initialised at all. Normalised hidden states times these weights spread by about 1.5.
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                torch.nn.init.normal_(parameter, std=0.25)
            elif parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model

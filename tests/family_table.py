"""Every family of transformers with routed experts, tiny, and what esft makes of it.

`tests/test_families.py` checks each entry; `tools/families_page.py` writes docs/families.md from
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.families import CONFIGS, LATENT, LINEAR, SCALED, SHARED
from tests.models import EXPERTS, HIDDEN, INNER, LAYERS, TOP_K

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        fields: of its language model's configuration, besides the usual sizes.
        scoring: how its router makes weights of logits.
        disk: whether a checkpoint has a tensor for each expert, or `fused` ones for all.
        shared: whether a layer has shared experts.
        mass: sum of a token's gate values, where it is always the same.
        scale: the constant that its routers multiply into the weights, in this configuration.
        packs: whether rows packed into one block cannot see each other.
        parts: the rest of its configuration, where it reads more than text; `fields` are of its
            `text_config` then.
        top_k: K.
        refused: why esft does not train it.
        since: the oldest version of transformers tested, where an older one is known not to do.
        note: for the page.
    """

    fields: Fields
    scoring: str
    disk: str = "per expert"
    shared: bool = False
    mass: float | None = None
    scale: float = 1.0
    packs: bool = True
    parts: Mapping[str, Any] = field(default_factory=dict)
    top_k: int = TOP_K
    refused: str | None = None
    since: str | None = None
    note: str = ""

    @property
    def fused(self) -> bool:
        """Whether a tensor on disk holds all experts of a layer."""
        return self.disk == "fused"

    @property
    def biased(self) -> bool:
        """Whether its routers choose with a bias that DeepSeek-V3's update can move."""
        return "biased" in self.scoring


# How routers make weights of logits; the last step is the weights' normalisation.
SOFTMAX = "softmax, top-k"
SOFTMAX_NORM = "softmax, top-k, normalised"
TOPK_SOFTMAX = "top-k, softmax"
TOPK_SIGMOID = "top-k, sigmoid"
SIGMOID_NORM = "sigmoid, top-k, normalised"
SIGMOID_BIAS = "sigmoid, biased top-k, normalised"
V3 = "sigmoid, groups, biased top-k, normalised"

_SPARSE: Fields = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_MIXED: Fields = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_INDEXED: Fields = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
_LATENT = LATENT | _SPARSE
_ROTARY: Fields = {"rope_type": "default", "rope_theta": 10000.0}
_INKLING: Fields = {
    "route_scale": 2.5,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
}
_QWEN4 = (
    SHARED
    | LINEAR
    | _MIXED
    | {
        "hc_lowrank": 8,
        "hc_count": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    }
)
_GLM5 = (
    _LATENT
    | _MIXED
    | _INDEXED
    | {
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "linear_head_dim": 16,
        "linear_num_heads": 2,
        "hc_mult": 2,
    }
)
_MISTRAL4_ROTARY: Fields = _ROTARY | {
    "type": "default",
    "partial_rotary_factor": 0.5,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 512,
}
_DOTS3 = _LATENT | _INDEXED | {"layer_types": ["indexed_attention"] * 3}
_INKLING_TEXT = _INKLING | _SPARSE | {"logits_mup_width_multiplier": 1.0}
_INKLING2_TEXT = _INKLING | {"layer_types": ["hybrid_sliding", "hybrid", "hybrid"]}
_QWEN35 = CONFIGS["qwen3_5_moe_text"]
_MINIMAX_M3 = _SPARSE | {"dense_intermediate_size": 20, "shared_intermediate_size": 20}
_LLAMA4: Fields = {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}

# Towers for images and sounds, that text never reaches.
VISION: Fields = {
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
_AUDIO: Fields = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "text_hidden_size": HIDDEN,
    "n_mel_bins": 4,
    "mel_vocab_size": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "max_source_positions": 16,
    "output_dim": HIDDEN,
    "out_hidden_size": HIDDEN,
    "downsample_hidden_size": 8,
    "adapter_input_size": 16,
    "adapter_out_dim": HIDDEN,
    "depths": [1],
    "hidden_sizes": [16],
    "patch_sizes": [4],
}
_SAM: Fields = VISION | {
    "output_channels": 8,
    "global_attn_indexes": [0],
    "downsample_channels": [16, 16],
    "mlp_dim": 16,
    "window_size": 2,
}
_OCR: Fields = {
    "sam_config": _SAM,
    "encoder_config": VISION | {"num_key_value_heads": 2, "vocab_size": 64},
}


def _reads(**parts: Fields) -> dict[str, Fields]:
    return {"vision_config": VISION} | {
        f"{name}_config": (VISION if name == "vision" else _AUDIO) | own
        for name, own in parts.items()
    }


_DOTS3_VISION: Fields = {
    "adapter_in_dim": 16,
    "adapter_out_dim": HIDDEN,
    "mlp_layer_types": ["dense"],
    "num_local_experts": 2,
    "moe_intermediate_size": 16,
}
FAMILIES: dict[str, Family] = {
    "afmoe": Family(CONFIGS["afmoe"], SIGMOID_BIAS, shared=True, mass=1, scale=2.5, packs=False),
    "aria": Family(
        {"model_type": "aria_text", "moe_num_shared_experts": 1},
        TOPK_SOFTMAX,
        "fused",
        shared=True,
        mass=1,
        since="5.23",
        parts=_reads(vision={"model_type": "idefics3_vision"}),
    ),
    "aria_text": Family(
        CONFIGS["aria_text"], TOPK_SOFTMAX, "fused", shared=True, mass=1, since="5.23"
    ),
    "axk1": Family(_LATENT | {"head_dim": 8}, V3, shared=True, mass=1, scale=2.5),
    "axk2": Family(_LATENT | _INDEXED | {"gated_norm_rank": 4}, V3, shared=True, mass=1, scale=2.5),
    "bailing_hybrid": Family(_LATENT | _MIXED, V3, shared=True, mass=1, scale=2.5, packs=False),
    "beam": Family(_SPARSE | SCALED, V3, mass=1),
    "cohere2_moe": Family(CONFIGS["cohere2_moe"], TOPK_SOFTMAX, shared=True, mass=1),
    "dbrx": Family(
        {
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
        SOFTMAX_NORM,
        "fused",
        mass=1,
    ),
    "deepseek_ocr2": Family(_LATENT, SOFTMAX, shared=True, scale=2.5, parts=_reads(vision=_OCR)),
    "deepseek_v2": Family(CONFIGS["deepseek_v2"], SOFTMAX, shared=True, scale=2.5),
    "deepseek_v3": Family(CONFIGS["deepseek_v3"], V3, shared=True, mass=1, scale=2.5),
    "deepseek_v32": Family(_LATENT | _INDEXED, V3, shared=True, mass=1, scale=2.5),
    "deepseek_v4": Family(
        {
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": ["sliding_attention"] * 3,
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "routed_scaling_factor": 2.5,
        },
        "sqrt-softplus, biased top-k (first layers: by token id), normalised",
        shared=True,
        since="5.23",
        mass=1,
        scale=2.5,
    ),
    "diffusion_gemma": Family(
        CONFIGS["gemma4_text"],
        "softmax, top-k, normalised, times a scale per expert",
        "fused",
        parts=_reads(),
        refused="it fills a canvas of noise",
    ),
    "doge": Family(
        {"is_moe": True, "num_experts": 16},
        "product keys",
        "embeddings",
        refused="its experts are embedding rows",
    ),
    "dots1": Family(
        CONFIGS["dots1"] | {"norm_topk_prob": True}, V3, shared=True, mass=1, scale=2.5
    ),
    "dots3_note": Family(
        _DOTS3,
        V3,
        shared=True,
        mass=1,
        scale=2.5,
        parts=_reads(vision=_DOTS3_VISION, audio={}),
    ),
    "dots3_note_text": Family(_DOTS3, V3, shared=True, mass=1, scale=2.5),
    "ernie4_5_moe": Family(
        CONFIGS["ernie4_5_moe"], "softmax, biased top-k, normalised", shared=True, mass=1
    ),
    "ernie4_5_vl_moe": Family(
        _SPARSE
        | {
            "moe_intermediate_size": [INNER, INNER],
            "rope_parameters": _ROTARY | {"mrope_section": [2, 2, 4]},
        },
        "softmax, biased top-k, normalised",
        parts=_reads(),
        refused="experts for text and those for images in one list",
    ),
    "exaone_moe": Family(CONFIGS["exaone_moe"], V3, shared=True, mass=1, scale=2.5),
    "flex_olmo": Family({}, SOFTMAX),
    "flint": Family(SHARED, TOPK_SIGMOID + ", normalised", shared=True, mass=1),
    "gemma4": Family(
        CONFIGS["gemma4_text"],
        "softmax, top-k, normalised, times a scale per expert",
        "fused",
        parts=_reads(vision={"model_type": "gemma4_vision"}),
    ),
    "gemma4_text": Family(
        CONFIGS["gemma4_text"], "softmax, top-k, normalised, times a scale per expert", "fused"
    ),
    "glm4_moe": Family(CONFIGS["glm4_moe"], V3, shared=True, mass=1, scale=2.5),
    "glm4_moe_lite": Family(CONFIGS["glm4_moe_lite"], V3, shared=True, mass=1, scale=2.5),
    "glm4v_moe": Family(
        SCALED
        | {
            "first_k_dense_replace": 1,
            "rope_parameters": _ROTARY | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        },
        V3,
        shared=True,
        mass=1,
        scale=2.5,
        packs=False,
        parts=_reads(),
    ),
    "glm5_next": Family(
        _GLM5,
        V3,
        shared=True,
        mass=1,
        scale=2.5,
        packs=False,
        parts=_reads(vision={"projection_intermediate_size": 16}),
    ),
    "glm_moe_dsa": Family(_LATENT | _INDEXED, V3, shared=True, mass=1, scale=2.5),
    "gpt_oss": Family({}, TOPK_SOFTMAX, "fused", mass=1, packs=False),
    "granitemoe": Family({}, TOPK_SOFTMAX, "fused", mass=1),
    "granitemoe_swa": Family(
        {"shared_intermediate_size": 20}, TOPK_SOFTMAX, "fused", shared=True, mass=1
    ),
    "granitemoehybrid": Family(
        CONFIGS["granitemoehybrid"] | {"shared_intermediate_size": 20},
        TOPK_SOFTMAX,
        "fused",
        shared=True,
        mass=1,
        packs=False,
    ),
    "granitemoeshared": Family(
        CONFIGS["granitemoeshared"], TOPK_SOFTMAX, "fused", shared=True, mass=1
    ),
    "hunyuan_v1_moe": Family({}, SOFTMAX_NORM, shared=True, mass=1),
    "hy_v3": Family(
        _SPARSE | {"router_scaling_factor": 2.5}, SIGMOID_BIAS, shared=True, mass=1, scale=2.5
    ),
    "hy_v4": Family(_LATENT | _INDEXED, V3, "fused", shared=True, mass=1, scale=2.5),
    "inkling2": Family(
        _INKLING2_TEXT,
        SIGMOID_BIAS,
        "fused",
        mass=1,
        scale=2.5,
        packs=False,
        parts=_reads(vision={"projection_hidden_dim": 16, "text_hidden_size": HIDDEN}),
    ),
    "inkling2_text": Family(_INKLING2_TEXT, SIGMOID_BIAS, "fused", mass=1, scale=2.5, packs=False),
    "inkling_mm_model": Family(
        _INKLING_TEXT,
        "sigmoid, biased top-k, normalised together with the shared experts",
        "fused",
        shared=True,
        scale=2.5,
        packs=False,
        parts=_reads(
            vision={
                "text_hidden_size": HIDDEN,
                "patch_size": 2,
                "num_channels": 1,
                "num_hidden_layers": 3,
            },
            audio={},
        ),
    ),
    "inkling_text": Family(
        _INKLING_TEXT,
        "sigmoid, biased top-k, normalised together with the shared experts",
        "fused",
        shared=True,
        scale=2.5,
        packs=False,
    ),
    "jamba": Family(CONFIGS["jamba"], SOFTMAX, packs=False),
    "jetmoe": Family(
        {"kv_channels": 16},
        TOPK_SOFTMAX,
        "fused",
        mass=1,
        note="the attention's experts stay frozen",
    ),
    "kimi_linear": Family(
        _LATENT | _MIXED | {"linear_head_dim": 16, "linear_num_heads": 2},
        V3,
        shared=True,
        mass=1,
        scale=2.5,
        packs=False,
    ),
    "kolibri1": Family(SHARED, "biased top-k, sigmoid, normalised if so configured", shared=True),
    "laguna": Family(
        _SPARSE | SHARED | {"moe_routed_scaling_factor": 2.5}, SIGMOID_BIAS, shared=True, mass=1
    ),
    "lfm2_moe": Family(
        CONFIGS["lfm2_moe"] | {"routed_scaling_factor": 2.5},
        SIGMOID_BIAS,
        mass=1,
        scale=2.5,
        packs=False,
    ),
    "llama4": Family(
        _LLAMA4,
        TOPK_SIGMOID + ", on the expert's input",
        "fused",
        shared=True,
        parts=_reads(
            vision={
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
            }
        ),
    ),
    "llama4_text": Family(_LLAMA4, TOPK_SIGMOID + ", on the expert's input", "fused", shared=True),
    "longcat_flash": Family(
        LATENT
        | {
            "num_hidden_layers": 6,  # two attentions each
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": INNER,
            "zero_expert_num": 4,
            "head_dim": 8,
        },
        "softmax, biased top-k",
        scale=2.5,
        note="zero-computation experts cannot be selected",
    ),
    "mellum": Family(_SPARSE, SOFTMAX),
    "mimo_v2_flash": Family(
        _SPARSE | SCALED | {"head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 1},
        V3,
        mass=1,
        scale=2.5,
    ),
    "minimax": Family(CONFIGS["minimax"], SOFTMAX_NORM, mass=1, packs=False),
    "minimax_m2": Family({}, SIGMOID_BIAS, mass=1),
    "minimax_m3_vl": Family(_MINIMAX_M3, SIGMOID_BIAS, shared=True, mass=1, parts=_reads()),
    "minimax_m3_vl_text": Family(_MINIMAX_M3, SIGMOID_BIAS, "fused", shared=True, mass=1),
    "mistral4": Family(
        LATENT | {"head_dim": 8, "rope_parameters": _MISTRAL4_ROTARY},
        "softmax, groups, top-k, normalised",
        "fused",
        shared=True,
        mass=1,
        scale=2.5,
    ),
    "mistral_large4": Family(
        _LATENT | _INDEXED,
        SOFTMAX_NORM,
        shared=True,
        mass=1,
        scale=2.5,
        parts=_reads(vision={"model_type": "pixtral"}),
    ),
    "mixtral": Family({}, SOFTMAX_NORM, mass=1),
    "muse_spark": Family(
        _SPARSE | {"moe_hidden_size": HIDDEN},
        SIGMOID_BIAS,
        parts=_reads(
            vision={"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
            audio={},
        ),
        refused="goes through a norm before it is weighed",
    ),
    "nemotron_h": Family(CONFIGS["nemotron_h"], V3, shared=True, mass=1, scale=2.5),
    "nllb-moe": Family(
        {
            "d_model": HIDDEN,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
        },
        SOFTMAX,
        refused="all tokens go to its experts 0 and 1",
    ),
    "olmoe": Family({}, SOFTMAX),
    "phimoe": Family({}, "sparsemixer"),
    "qwen2_moe": Family(SHARED, SOFTMAX, shared=True),
    "qwen3_5_moe": Family(_QWEN35, SOFTMAX_NORM, shared=True, mass=1, packs=False, parts=_reads()),
    "qwen3_5_moe_text": Family(_QWEN35, SOFTMAX_NORM, shared=True, mass=1, packs=False),
    "qwen3_moe": Family({"norm_topk_prob": True}, SOFTMAX_NORM, mass=1),
    "qwen3_next": Family(CONFIGS["qwen3_next"], SOFTMAX_NORM, shared=True, mass=1, packs=False),
    "qwen3_omni_moe_thinker": Family(
        {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}},
        SOFTMAX_NORM,
        mass=1,
        parts=_reads(audio={}) | {"vision_start_token_id": 50},
    ),
    "qwen3_vl_moe": Family(
        {"rope_parameters": _ROTARY | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}},
        SOFTMAX_NORM,
        "fused",
        mass=1,
        parts=_reads(vision={"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    ),
    "qwen4_exp": Family(_QWEN4, SOFTMAX_NORM, shared=True, mass=1, packs=False, parts=_reads()),
    "qwen4_exp_text": Family(_QWEN4, SOFTMAX_NORM, shared=True, mass=1, packs=False),
    "solar_open": Family(CONFIGS["solar_open"], V3, shared=True, mass=1, scale=2.5),
    "step3p7": Family(
        _SPARSE
        | {
            "share_expert_dim": 20,
            "moe_router_scaling_factor": 2.5,
            "layer_types": ["full_attention"] * 3,
            "sliding_window": 64,
            "num_sliding_attention_heads": 2,
        },
        SIGMOID_BIAS,
        "fused",
        shared=True,
        mass=1,
        parts=_reads(vision={"mlp_ratio": 2.0, "max_position_embeddings": 4}),
    ),
    "switch_transformers": Family(
        {
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": INNER,
            "num_heads": 2,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "expert_capacity": EXPERTS,
        },
        "softmax, top-1",
        since="5.23",
        top_k=1,
        packs=False,
        note="by the Python API: `esft.attach`, `esft.pairs.profile_pairs`",
    ),
    "unlimited_ocr": Family(_LATENT, SOFTMAX, shared=True, scale=2.5, parts=_reads(vision=_OCR)),
    "zaya": Family(
        {"num_experts_per_tok": 1, "router_hidden_size": 16},
        "softmax, biased top-k, with a class for no expert",
        "fused",
        top_k=1,
        packs=False,
        note="choices of no expert are not an expert's",
    ),
}

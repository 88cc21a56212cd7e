"""Shrunken random models of the families that recipes ship for, from the hub's configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import VOCAB
from tests.toy_tokenizers import byte_tokenizer

CONFIGS = Path(__file__).parent / "golden" / "configs"

LAYERS, EXPERTS, TOP_K = 2, 8, 2
_MORE_EXPERTS = {"zai-org/GLM-4.5-Air": 48}  # its recipe's 2 % of the model must hold an expert
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
}


def config_file(model: str) -> Path:
    """Return where a hub model's `config.json` is kept, less what esft has no use for."""
    return CONFIGS / f"{model.replace('/', '--')}.json"


def config_of(model: str) -> dict[str, Any]:
    """Return a hub model's configuration."""
    return json.loads(config_file(model).read_text())


def save_shrunken(folder: Path, model: str) -> Path:
    """Save a random model of a hub model's family, small in every size and else like it.

    Args:
        folder: where to.
        model: the hub id; its configuration is in `CONFIGS`.
    """
    tokenizer = byte_tokenizer()
    fields = config_of(model)
    fields |= {name: size for name, size in _SIZES.items() if name in fields}
    if model in _MORE_EXPERTS:
        fields["n_routed_experts"] = _MORE_EXPERTS[model]
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:LAYERS]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = getattr(tokenizer, name)
    config = AutoConfig.for_model(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for parameter in made.parameters():
            if parameter.dim() >= 2:  # the default spread lets all experts be equally likely
                torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Tiny random models of our own classes; their routers do not send all tokens one way.

No side of an expert's matrices equals another: where they are swapped, it must not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import esft.models  # noqa: F401  makes the classes known to transformers

NAMES = ("grok1", "openmoe", "moeut")
VOCAB, HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 24, 8, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OWN: dict[str, dict[str, Any]] = {
    "grok1": {
        "num_key_value_heads": 2,
        "intermediate_size": INNER,
        "attention_scaling": 0.25,
        "attn_logit_softcapping": 3.0,  # low enough to be felt
        "embedding_multiplier": HIDDEN**0.5,
    },
    # Layers 1 and 3 have experts.
    "openmoe": {
        "num_key_value_heads": 4,
        "intermediate_size": INNER,
        "num_hidden_layers": 4,
        "moe_layer_interval": 2,
        "attention_scaling": 0.25,
        "norm_topk_prob": True,
    },
    # Two layers, run twice: feed-forward experts are 0 and 1, value experts 2 and 3, output
    # experts 4 and 5, two of four for each of four heads.
    "moeut": {
        "num_hidden_layers": 4,
        "group_size": 2,
        "moe_intermediate_size": INNER,
        "attention_num_experts": 4,
        "attention_num_experts_per_tok": 2,
    },
}


def fresh(name: str, seed: int = 0, **overrides: Any) -> Any:
    """Return an fp32 language model as its class initialises it.

    Args:
        name: one of `NAMES`.
        seed: of the weights; the caller's random state is left alone.
        overrides: fields of the configuration.
    """
    config = AutoConfig.for_model(name, **(_COMMON | _OWN[name] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def tiny(name: str, seed: int = 0, **overrides: Any) -> Any:
    """Return the same with larger weights and norms that do something, in evaluation mode."""
    model = fresh(name, seed, **overrides).eval()
    generator = torch.Generator().manual_seed(seed)
    for part, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2, generator=generator)
        else:
            spread = 0.25 if part.endswith(("gate.weight", "router.weight")) else 0.2
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return model


def wide(name: str, seed: int = 0, **overrides: Any) -> Any:
    """Return the same in float64, which only the plain loop over experts computes in."""
    model = tiny(name, seed, **overrides)
    model.set_experts_implementation("eager")
    return model.double()


def ids(rows: int = 2, length: int = 24, seed: int = 7, vocab: int = VOCAB) -> torch.Tensor:
    """Return seeded random token ids, no special ones: `[rows, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)

"""Models that mix packed rows are found, whatever they are; the others are not suspected."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import esft
from esft.data.isolation import check_isolation
from esft.data.packing import collate, pack
from esft.errors import ModelError
from tests.checkpoints import VOCAB
from tests.data.test_packing import EOS, LENGTHS, documents, items, losses_alone, losses_in
from tests.models import FAMILIES, tiny
from tests.toy_tokenizers import byte_tokenizer

# Attention without position_ids in its mask; linear attention; state space; convolution.
MIXING: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
    "qwen3_next": {
        "num_experts": 4,
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "jamba": {"num_experts": 4, "mamba_d_state": 8},
    "lfm2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
}


def mixing(family: str) -> Any:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        pad_token_id=0,
        **MIXING[family],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # the default spread of 0.02 would hide what passes between rows
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def difference(model: Any) -> float:
    """The largest change of a token's loss by packing."""
    examples = documents(*LENGTHS)
    with torch.no_grad():
        alone = torch.cat(losses_alone(model, examples))
        packed = losses_in(model, collate(items(pack(examples, 24, pad_id=EOS))))
    return (alone - packed).abs().max().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_keep_rows_apart(family: str, attention: str) -> None:
    model = tiny(family, attn_implementation=attention).train()
    check_isolation(model)
    check_isolation(model.bfloat16())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", MIXING)
def test_families_that_mix_rows(family: str) -> None:
    model = mixing(family)
    assert difference(model) > 0.1
    with pytest.raises(ModelError, match=rf"^{family}: .*set data.packing: false"):
        check_isolation(model)


def test_training_refuses_to_pack_where_rows_mix(tmp_path: Path) -> None:
    mixing("gpt_oss").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "2+2=", "completion": "4"}\n' * 8)
    recipe = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(data), "max_length": 64, "packing": True},
        "training": {"max_steps": 1},
        "device": "cpu",
    }
    with pytest.raises(ModelError, match=r"set data\.packing: false"):
        esft.train(recipe, tmp_path / "run")
    assert sorted(os.listdir(tmp_path)) == ["model", "train.jsonl"]

"""Grok-1 against a plain loop in float64, written from the released code's description."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from esft.models import Grok1Config
from tests.models_of_ours.tiny_models import TOP_K, ids, wide


def norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    """The tanh form, as `jax.nn.gelu` computes it."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turned(x: Tensor, place: int, theta: float) -> Tensor:
    """One head's vector, rotated by its place: channel i goes with channel i + D/2."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = place * theta ** (-i / half)
        a, b = x[i], x[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_loop(model: torch.nn.Module, row: list[int]) -> Tensor:
    """Return the logits of one row, `[S, V]`, one token, head and expert at a time."""
    config = model.config
    w = {name: p.detach() for name, p in model.named_parameters()}
    D, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    cap = config.attn_logit_softcapping
    hidden = [w["model.embed_tokens.weight"][i] * config.embedding_multiplier for i in row]
    for number in range(config.num_hidden_layers):
        own = {
            name.split(".", 3)[3]: p
            for name, p in w.items()
            if name.startswith(f"model.layers.{number}.")
        }
        normed = [norm(x, own["input_norm.weight"]) for x in hidden]
        query, key, value = (
            [(own[f"self_attn.{kind}_proj.weight"] @ x).view(-1, D) for x in normed]
            for kind in ("q", "k", "v")
        )
        for place, x in enumerate(hidden):
            heads = []
            for head in range(config.num_attention_heads):
                shared = head // groups
                q = turned(query[place][head], place, config.rope_theta)
                weights = []
                for other in range(place + 1):
                    logit = q @ turned(key[other][shared], other, config.rope_theta)
                    weights.append(
                        math.exp(cap * math.tanh(logit * config.attention_scaling / cap))
                    )
                heads.append(
                    sum(p / sum(weights) * value[other][shared] for other, p in enumerate(weights))
                )
            out = own["self_attn.o_proj.weight"] @ torch.cat(heads)
            hidden[place] = x + norm(out, own["post_attention_norm.weight"])
        for place, x in enumerate(hidden):
            x_in = norm(x, own["pre_feedforward_norm.weight"])
            powers = (own["mlp.gate.weight"] @ x_in).exp()
            chosen = sorted(range(len(powers)), key=lambda i, p=powers: -p[i])[:TOP_K]
            out = torch.zeros_like(x)
            for expert in chosen:
                gate, up = (own["mlp.experts.gate_up_proj"][expert] @ x_in).view(2, -1)
                y = own["mlp.experts.down_proj"][expert] @ (gelu(gate) * up)
                out += powers[expert] / powers.sum() * y  # not divided by the chosen ones' sum
            hidden[place] = x + norm(out, own["post_feedforward_norm.weight"])
    head = w["model.embed_tokens.weight"]  # tied
    logits = torch.stack([head @ norm(x, w["model.norm.weight"]) for x in hidden])
    logits = logits * config.output_multiplier
    final = config.final_logit_softcapping
    return logits if final is None else final * torch.tanh(logits / final)


@pytest.mark.parametrize("final_cap", [None, 2.0])
def test_logits_are_the_plain_loop(final_cap: float | None) -> None:
    model = wide("grok1", final_logit_softcapping=final_cap)
    row = ids(rows=1, length=7)
    with torch.no_grad():
        found = model(row).logits[0]
    assert torch.allclose(found, plain_loop(model, row[0].tolist()), atol=1e-10, rtol=0)
    if final_cap is not None:
        assert found.abs().max() < final_cap


def test_caps_change_what_is_large_and_nothing_else() -> None:
    rows = ids()
    with torch.no_grad():
        logits = {
            cap: wide("grok1", attn_logit_softcapping=cap)(rows).logits for cap in (None, 1e6, 3.0)
        }
    assert torch.allclose(logits[None], logits[1e6], atol=1e-8, rtol=0)
    assert (logits[None] - logits[3.0]).abs().max() > 1e-2


def test_the_defaults_are_the_released_model() -> None:
    """Figures of github.com/xai-org/grok-1 `run.py`."""
    config = Grok1Config()
    assert config.embedding_multiplier == pytest.approx(78.38367176906169, rel=1e-15)
    assert config.output_multiplier == pytest.approx(0.5773502691896257, rel=1e-15)
    assert config.attention_scaling == pytest.approx(0.08838834764831845, rel=1e-15)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # 64 layers of 8 experts of 3 * 6144 * 32768, attention, embeddings: announced as 314 billion.
    attention = 2 * 6144 * (48 + 8) * 128
    layer = 8 * 3 * 6144 * 32768 + attention + 8 * 6144 + 4 * 6144
    assert sum(p.numel() for p in model.parameters()) == 64 * layer + 131072 * 6144 + 6144
    assert model.lm_head.weight is model.model.embed_tokens.weight

"""Profiling: AGS and TSR against a plain loop over tokens, on four families, with padding."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from esft.data.example import Example
from esft.errors import DataError, ModelError
from esft.experts import attach, detach
from esft.moe import moe_layers
from esft.profiling import profile, profile_model
from esft.scores import Scores
from esft.selection import Selection, select
from tests.checkpoints import save_tiny
from tests.models import EXPERTS, FAMILIES, HIDDEN, INNER, TOP_K, VOCAB, tiny

# Name -> family, changes to its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "deepseek_v2 scaled": ("deepseek_v2", {"routed_scaling_factor": 2.5}),
    "deepseek_v2 all sparse": ("deepseek_v2", {"first_k_dense_replace": 0}),
    "olmoe normalised": ("olmoe", {"norm_topk_prob": True}),
    "qwen3_moe not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe some dense": ("qwen3_moe", {"mlp_only_layers": [1]}),
}


def model_of(name: str) -> PreTrainedModel:
    family, overrides = MODELS[name]
    return tiny(family, **overrides)


def rows(lengths: tuple[int, ...] = (3, 17, 40, 1, 9, 23), seed: int = 0) -> list[Example]:
    """Rows of unequal length whose last third is the answer."""
    rng = random.Random(seed)
    return [
        Example(
            [rng.randrange(3, VOCAB) for _ in range(length)],
            [place >= length - length // 3 for place in range(length)],
            f"rows:{number}",
        )
        for number, length in enumerate(lengths, start=1)
    ]


def normalises(model: PreTrainedModel) -> bool:
    """Whether a family divides a token's K weights by their sum; DeepSeek-V2 never does."""
    kind = model.config.model_type
    return kind == "mixtral" or (kind != "deepseek_v2" and model.config.norm_topk_prob)


def plain_loop(
    model: PreTrainedModel, examples: list[Example], count: str
) -> dict[int, tuple[list[float], list[float]]]:
    """TSR and AGS by definition, one row and one token at a time, in Python's floats.

    Only the routers' inputs and weights are taken from the model; scoring is done here.
    """
    inputs: dict[int, torch.Tensor] = {}
    routers = {layer.index: layer.router for layer in moe_layers(model)}
    for index, router in routers.items():
        assert router is not None
        router.register_forward_pre_hook(
            lambda _module, args, index=index: inputs.__setitem__(index, args[0])
        )
    chosen = {index: [0] * EXPERTS for index in routers}
    gates = {index: [0.0] * EXPERTS for index in routers}
    tokens = 0
    for example in examples:
        with torch.no_grad():
            model(torch.tensor([example.input_ids]))
        wanted = [
            count == "all" or answer == (count == "completion") for answer in example.completion
        ]
        tokens += sum(wanted)
        for index, router in routers.items():
            weight = router.weight.double().tolist()  # type: ignore[union-attr, operator]
            hidden = inputs[index].reshape(len(wanted), -1).double().tolist()
            for state, counted in zip(hidden, wanted, strict=True):
                if not counted:
                    continue
                logits = [sum(w * h for w, h in zip(row, state, strict=True)) for row in weight]
                powers = [math.exp(logit) for logit in logits]
                probabilities = [power / sum(powers) for power in powers]
                best = sorted(range(EXPERTS), key=lambda i, p=probabilities: -p[i])[:TOP_K]
                whole = sum(probabilities[i] for i in best) if normalises(model) else 1.0
                for i in best:
                    chosen[index][i] += 1
                    gates[index][i] += probabilities[i] / whole
    return {
        index: (
            [number / TOP_K / tokens for number in chosen[index]],
            [total / tokens for total in gates[index]],
        )
        for index in routers
    }


@pytest.mark.parametrize("count", ["all", "prompt", "completion"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_plain_loop(name: str, count: str) -> None:
    model, examples = model_of(name), rows()
    found = profile_model(model, examples, count=count)
    expected = plain_loop(model, examples, count)
    assert list(found.layers) == sorted(expected)
    for index, (token, gate) in expected.items():
        layer = found.layers[index]
        assert (layer.experts, layer.top_k) == (EXPERTS, TOP_K)
        assert layer.token == pytest.approx(token, abs=1e-12)
        # The model works in fp32; the loop starts from its hidden states.
        assert layer.gate == pytest.approx(gate, abs=1e-6)
        assert len(set(layer.token)) > 3  # the routers do choose


@pytest.mark.parametrize("name", MODELS)
def test_batching_changes_only_the_order_of_sums(name: str) -> None:
    model, examples = model_of(name), rows()
    single = profile_model(model, examples, batch_tokens=1)
    for batch_tokens in (45, 100, 10_000):
        batched = profile_model(model, examples, batch_tokens=batch_tokens)
        assert batched.sample == single.sample
        assert batched.stability == single.stability
        for index, layer in single.layers.items():
            assert batched.layers[index].token == layer.token
            assert batched.layers[index].gate == pytest.approx(layer.gate, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_s_selection_ratios_sum_to_one(family: str) -> None:
    found = profile_model(tiny(family), rows())
    for layer in found.layers.values():
        assert sum(layer.token) == pytest.approx(1, abs=1e-12)
        normalised = family in ("mixtral", "qwen3_moe")
        assert (sum(layer.gate) == pytest.approx(1, abs=1e-6)) == normalised


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # Sigmoid scores, normalised, then times 2.5: the gate value is before that factor.
        (
            "deepseek_v3",
            {
                "n_routed_experts": EXPERTS,
                "n_group": 2,
                "topk_group": 1,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 1,
                "kv_lora_rank": 16,
                "q_lora_rank": None,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            },
        ),
        # Softmax over the chosen ones only; transposed, interleaved experts with biases.
        (
            "gpt_oss",
            {
                "num_local_experts": EXPERTS,
                "head_dim": 16,
                "layer_types": ["full_attention"] * 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        ("granitemoe", {"num_local_experts": EXPERTS}),
    ],
)
def test_other_routers_that_normalise_give_a_gate_mass_of_one(
    kind: str, options: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(kind, **SMALL | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    for layer in profile_model(model, rows()).layers.values():
        assert sum(layer.token) == pytest.approx(1, abs=1e-12)
        assert sum(layer.gate) == pytest.approx(1, abs=1e-5)


def write_rows(path: Path, completions: list[str]) -> Path:
    lines = [json.dumps({"prompt": "p", "completion": text}) + "\n" for text in completions]
    path.write_text("".join(lines))
    return path


def test_a_sample_larger_than_the_data_counts_every_token(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny", "mixtral")
    data = write_rows(tmp_path / "data.jsonl", ["x" * (n % 5 + 1) for n in range(2300)])
    # BOS, "p", 1 to 5 bytes, EOS.
    assert profile(checkpoint, data).sample["tokens"] == 2300 * (3 + 3)


def test_every_row_can_be_drawn(tmp_path: Path) -> None:
    """Also those far down a file that is longer than what is turned into tokens at a time.

    200 rows of one kind or the other: the scores are a mixture of the two kinds' scores, and the
    weight in it is the share of rows of the second kind.
    """
    checkpoint = save_tiny(tmp_path / "tiny", "mixtral")
    data = write_rows(tmp_path / "data.jsonl", ["a"] * 1500 + ["b"] * 1500)
    only_b = write_rows(tmp_path / "b.jsonl", ["b"] * 1500)
    both = profile(checkpoint, data, tokens=800).layers[0].token
    b = profile(checkpoint, only_b, tokens=800).layers[0].token
    only_a = write_rows(tmp_path / "a.jsonl", ["a"] * 1500)
    a = profile(checkpoint, only_a, tokens=800).layers[0].token
    weight = [(m - x) / (y - x) for m, x, y in zip(both, a, b, strict=True) if abs(y - x) > 0.05]
    assert weight
    assert all(0.35 < w < 0.65 for w in weight)


def test_rows_longer_than_the_model_can_take_are_cut(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny", "mixtral")  # its limit is 512 positions
    data = write_rows(tmp_path / "data.jsonl", ["x" * 600, "x" * 600])
    assert profile(checkpoint, data).sample["tokens"] == 2 * 512
    assert profile(checkpoint, data, seq_len=100).sample["tokens"] == 2 * 100


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_counted_the_same_way(family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    found = profile_model(model, rows())
    for layer in found.layers.values():
        assert sum(layer.token) == pytest.approx(1, abs=1e-12)


def test_an_attached_model_is_profiled_like_a_plain_one() -> None:
    examples = rows()
    plain = profile_model(tiny("qwen3_moe"), examples)
    model = attach(tiny("qwen3_moe"), select(plain, p=0.3))
    attached = profile_model(model, examples)
    for index, layer in plain.layers.items():
        assert attached.layers[index].token == layer.token
        assert attached.layers[index].gate == pytest.approx(layer.gate, abs=1e-6)
    assert attached.model["routed_parameters"] == plain.model["routed_parameters"]
    detach(model)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("olmoe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile_model(model, rows())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_model_and_sample_are_described() -> None:
    model = tiny("deepseek_v2")
    found = profile_model(model, rows(), count="completion", name="mine")
    assert found.model == {
        "name": "mine",
        "model_type": "deepseek_v2",
        "architecture": "DeepseekV2ForCausalLM",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "routed_parameters": 2 * EXPERTS * 3 * INNER * HIDDEN,
        "expert_parameters": 3 * INNER * HIDDEN,
        "bytes_per_parameter": 4,
    }
    answers = 1 + 5 + 13 + 0 + 3 + 7
    assert found.sample == {"count": "completion", "tokens": answers, "sequences": 6}
    assert Scores.from_dict(found.to_dict()) == found


def test_stability_compares_each_half_with_the_whole() -> None:
    """Oracle: profile the halves by themselves and count what stays."""
    model, examples = tiny("qwen3_moe"), rows((30,) * 10)
    found = profile_model(model, examples)
    parts = [profile_model(model, examples[half::2]) for half in (0, 1)]
    for metric in ("token", "gate"):
        whole = select(found, metric=metric).experts
        kept = []
        for part in parts:
            half = select(part, metric=metric).experts
            stays = sum(len(set(whole[layer]) & set(half[layer])) for layer in whole)
            kept.append(stays / sum(map(len, whole.values())))
        assert found.stability[metric] == pytest.approx(sum(kept) / 2)
        assert 0.2 < found.stability[metric] <= 1
        for index, layer in found.layers.items():
            assert [half.tokens for half in layer.halves] == [150, 150]
            for half, part in zip(layer.halves, parts, strict=True):
                alone = part.layers[index].metric(metric)
                assert half.metric(metric) == pytest.approx(alone, abs=1e-7)
    assert found.stability["p"] == 0.2


def test_one_row_says_nothing_of_stability() -> None:
    found = profile_model(tiny("mixtral"), rows((20,)))
    assert found.stability == {}
    assert all(layer.halves == () for layer in found.layers.values())


def test_a_sample_without_a_counted_token_is_refused() -> None:
    with pytest.raises(DataError, match="--count completion: no token"):
        profile_model(tiny("mixtral"), rows((2, 1)), count="completion")
    with pytest.raises(DataError, match='--count "answers"'):
        profile_model(tiny("mixtral"), rows(), count="answers")


class Rerouted(torch.nn.Module):
    """A router that changes what another one decides."""

    def __init__(self, router: torch.nn.Module, change: Any) -> None:
        super().__init__()
        self.router, self.change, self.top_k = router, change, TOP_K

    def forward(self, hidden: torch.Tensor) -> Any:
        logits, weight, index = self.router(hidden)
        return logits, *self.change(weight, index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # An id that no expert has, as some families mean "none": beyond the last, or negative.
        (lambda w, i: (w, torch.where(i == 3, EXPERTS, i)), r"none of its 8 experts"),
        (lambda w, i: (w, torch.where(i == 3, -1, i)), r"none of its 8 experts"),
        (lambda w, i: (w[:, :1], i[:, :1]), r"expected 2 experts for each of \d+ tokens"),
    ],
)
def test_routers_that_choose_no_real_expert_are_refused(change: Any, message: str) -> None:
    model = tiny("olmoe")
    block = model.model.layers[1].mlp
    block.gate = Rerouted(block.gate, change)
    # The experts themselves could not compute this: what they return does not matter here.
    block.experts.forward = lambda hidden, *_: hidden
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.experts.*cannot be profiled"
    ) as e:
        profile_model(model, rows())
    assert e.match(message)


def test_a_dense_model_is_refused() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ModelError, match="dense"):
        profile_model(AutoModelForCausalLM.from_config(config), rows())


def test_selection_from_a_profile_fits_the_model() -> None:
    model = tiny("deepseek_v2")
    selection: Selection = select(profile_model(model, rows()), budget="10%")
    selection.check_against({layer.index: layer.num_experts for layer in moe_layers(model)})
    summary = selection.summary()
    assert summary.parameters == summary.experts * 3 * INNER * HIDDEN
    assert summary.share_of_model is not None
    assert summary.share_of_model <= 0.1

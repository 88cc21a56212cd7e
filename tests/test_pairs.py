"""Encoder-decoders: Switch Transformers through the Python API, and why NLLB-MoE is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from esft.changes import expert_changes
from esft.delta import attach_delta, write_delta
from esft.errors import DataError, ModelError
from esft.experts import attach, attached_layers, detach
from esft.fingerprint import fingerprint
from esft.loading import load_model
from esft.merging import merge, verify
from esft.moe import inspect, moe_layers, trainable_parameters
from esft.pairs import Pair, profile_pairs
from esft.scores import Scores
from esft.selection import Selection, select
from esft.shards import open_checkpoint
from tests.command import esft
from tests.models import EXPERTS, HIDDEN, INNER, VOCAB, tiny

# Two blocks on either side, of which the second has experts.
PICKED = {1: [5, 0], 3: [3]}
PAIRS = [
    Pair([5, 9, 13, 40, 1], [7, 7, 30, 1]),
    Pair([3, 1], [8, 21, 33, 4, 50, 61, 1]),
    Pair([*range(10, 60), 1], [12, 1]),
]


def switch(**overrides: Any) -> Any:
    config = AutoConfig.for_model(
        "switch_transformers",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=INNER,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=EXPERTS,
        expert_capacity=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **overrides,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def steps(model: Any, count: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        loss = model(
            input_ids=torch.tensor([PAIRS[2].source]), labels=torch.tensor([PAIRS[1].target])
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_layers_of_the_decoder_are_numbered_after_the_encoder_s(tmp_path: Path) -> None:
    model = switch()
    names = {layer.index: layer.name for layer in moe_layers(model)}
    assert names == {
        1: "encoder.block.1.layer.1.mlp.experts",
        3: "decoder.block.1.layer.2.mlp.experts",
    }
    found = inspect(model)
    assert found.per_expert == 2 * HIDDEN * INNER
    assert found.routed == 2 * EXPERTS * found.per_expert
    model.save_pretrained(tmp_path)
    printed = esft("inspect", tmp_path)
    assert printed.returncode == 0
    lines = [" ".join(line.split()) for line in printed.stdout.splitlines()]
    assert "layers 1 encoder.block.*.layer.1.mlp.experts" in lines
    assert "layers 3 decoder.block.*.layer.2.mlp.experts" in lines


def test_scores_are_a_plain_loop_s() -> None:
    """One pair and one token at a time; also for tokens that found their expert full."""
    model = switch()
    seen: dict[int, tuple[torch.Tensor, Any]] = {}
    layers = {layer.index: layer for layer in moe_layers(model)}
    for index, layer in layers.items():
        layer.router.register_forward_hook(  # type: ignore[union-attr]
            lambda _module, args, output, index=index: seen.__setitem__(index, (args[0], output))
        )
    counts = {index: [0] * EXPERTS for index in layers}
    gates = {index: [0.0] * EXPERTS for index in layers}
    full = 0
    for source, target in PAIRS:
        decoder_ids = torch.tensor([[0, *target[:-1]]])
        with torch.no_grad():
            model(input_ids=torch.tensor([source]), decoder_input_ids=decoder_ids)
        for index, layer in layers.items():
            hidden, (mask, _, _) = seen[index]
            weight = layer.router.classifier.weight.detach().double()  # type: ignore[union-attr, operator]
            for state, kept in zip(hidden[0].double(), mask[0], strict=True):
                p = (weight @ state).softmax(0)
                best = max(range(EXPERTS), key=lambda i, p=p: float(p[i]))
                counts[index][best] += 1
                gates[index][best] += float(p[best])
                full += not kept.any()
    assert full > 0
    found = profile_pairs(model, PAIRS)
    for index, side in ((1, 0), (3, 1)):
        tokens = sum(len(pair[side]) for pair in PAIRS)
        layer = found.layers[index]
        assert (layer.experts, layer.top_k, layer.tokens) == (EXPERTS, 1, tokens)
        assert layer.token == pytest.approx([n / tokens for n in counts[index]], abs=1e-12)
        assert layer.gate == pytest.approx([g / tokens for g in gates[index]], abs=1e-6)
    assert Scores.from_dict(found.to_dict()) == found
    assert set(select(found, p=0.5).experts) == {1, 3}


def test_train_delta_and_merge(tmp_path: Path) -> None:
    base = tmp_path / "base"
    switch().to(torch.bfloat16).save_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base, dtype="auto").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, Selection(experts=PICKED))
    assert sum(p.numel() for p in trainable_parameters(model).values()) == 3 * 2 * HIDDEN * INNER
    losses = steps(model, 5)
    assert losses[-1] < losses[0]
    found = fingerprint(open_checkpoint(base))
    (tmp_path / "delta").mkdir()
    changes = expert_changes(model, found)
    write_delta(tmp_path / "delta", found, changes, {"method": "esft", "base": {"name": "tiny"}})
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert verify(base, tmp_path / "delta", merged).changed == len(changes) == 3 * 2
    trained = detach(model).state_dict()
    again = AutoModelForSeq2SeqLM.from_pretrained(merged, dtype="auto").eval()
    for each in (again, model):
        for parameter in each.parameters():
            parameter.data = parameter.data.clone()
    moved = set()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
        if not torch.equal(tensor, before[name]):
            moved.add(".".join(name.split(".")[:-2]))
    places = {1: "encoder.block.1.layer.1.mlp", 3: "decoder.block.1.layer.2.mlp"}
    assert moved <= {
        f"{places[layer]}.experts.expert_{expert}"
        for layer, experts in PICKED.items()
        for expert in experts
    }
    assert moved
    inputs = {"input_ids": torch.tensor([PAIRS[2].source]), "labels": torch.tensor([[5, 7, 1]])}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    target = AutoModelForSeq2SeqLM.from_pretrained(base, dtype="auto")
    for name, tensor in attach_delta(target, base, tmp_path / "delta").state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    assert len(load_file(merged / "model.safetensors")) == len(found)


def test_gradients_are_ordinary_autograd_s() -> None:
    model = switch()
    whole = switch().requires_grad_(True)
    inputs = {"input_ids": torch.tensor([PAIRS[2].source]), "labels": torch.tensor([[5, 7, 1]])}
    whole(**inputs).loss.backward()
    attach(model, Selection(experts={1: list(range(EXPERTS))}))
    model(**inputs).loss.backward()
    experts = whole.encoder.block[1].layer[1].mlp.experts
    (attached, _) = attached_layers(model)
    compared = 0
    for name in ("wi", "wo"):
        grad = attached.banks.trained(f"{name}.weight").grad
        assert grad is not None
        for expert in range(EXPERTS):
            expected = getattr(experts[f"expert_{expert}"], name).weight.grad
            if expected is None:  # nobody's choice
                assert not grad[expert].any()
                continue
            assert (grad[expert] - expected).norm() <= 1e-5 * expected.norm()
            compared += 1
    assert compared >= 4


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="qwen3_moe: this is no encoder-decoder"):
        profile_pairs(tiny("qwen3_moe"), PAIRS)
    for pairs in ([], [Pair([3, 1], [])]):
        with pytest.raises(DataError, match="source or target is empty"):
            profile_pairs(switch(), pairs)
    switch().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="switch_transformers is an encoder-decoder"):
        load_model(tmp_path)


def nllb() -> Any:
    config = AutoConfig.for_model(
        "nllb-moe",
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER,
        num_experts=EXPERTS,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLM.from_config(config).eval()


def test_nllb_moe_is_refused_as_long_as_transformers_calls_two_of_its_experts() -> None:
    """Should this fail because others are called: the fault is mended; support the family."""
    model = nllb()
    with pytest.raises(ModelError, match=r"nllb-moe: .* all tokens go to its experts 0 and 1"):
        inspect(model)
    called = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_hook(lambda *_, name=name: called.add(name.rpartition("_")[2]))
    with torch.no_grad():
        ids = torch.arange(4, 60)[None]
        model(input_ids=ids, decoder_input_ids=ids)
    assert called == {"0", "1"}

"""esft on our own models: scored as a plain loop does, trained, merged and reloaded bit for bit."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import esft
from esft.data.example import Example
from esft.experts import attach, detach
from esft.moe import MoeLayer, moe_layers
from esft.profiling import profile_model
from esft.selection import Selection, select
from tests.checkpoints import VOCAB as BYTES
from tests.command import esft as command
from tests.command import esft_process
from tests.deltas import load, train_delta
from tests.models_of_ours.tiny_models import NAMES, VOCAB, tiny
from tests.toy_tokenizers import byte_tokenizer
from tests.training_loop import batches, train_steps

every = pytest.mark.parametrize("name", NAMES)


def rows(lengths: tuple[int, ...] = (3, 17, 40, 1, 9, 23)) -> list[Example]:
    rng = random.Random(0)
    return [
        Example([rng.randrange(3, VOCAB) for _ in range(length)], [True] * length, f"rows:{number}")
        for number, length in enumerate(lengths, start=1)
    ]


def softmax_gates(logits: list[float], layer: MoeLayer) -> dict[int, float]:
    """Gate values of Grok-1's router: top-K probabilities as they are."""
    powers = [math.exp(logit) for logit in logits]
    best = sorted(range(len(powers)), key=lambda i: -powers[i])[: layer.top_k]
    return {i: powers[i] / sum(powers) for i in best}


def normalised_gates(logits: list[float], layer: MoeLayer) -> dict[int, float]:
    """Divided by their sum, as ST-MoE has them."""
    gates = softmax_gates(logits, layer)
    return {i: gate / sum(gates.values()) for i, gate in gates.items()}


def sigmoid_gates(logits: list[float], layer: MoeLayer) -> dict[int, float]:
    """Top-K sigmoids; in MoEUT's attention, top-2 of the four experts of each of four heads."""
    heads = 4 if "self_attn" in layer.name else 1
    each, K = len(logits) // heads, layer.top_k // heads
    best = [
        i
        for first in range(0, len(logits), each)
        for i in sorted(range(first, first + each), key=lambda i: -logits[i])[:K]
    ]
    return {i: 1 / (1 + math.exp(-logits[i])) for i in best}


GATES = {"grok1": softmax_gates, "openmoe": normalised_gates, "moeut": sigmoid_gates}


@every
def test_scores_are_the_plain_loop(name: str) -> None:
    """Only the routers' inputs and weights are the model's; each row runs by itself.

    A layer that runs twice is scored over both uses.
    """
    model, examples = tiny(name), rows()
    layers = moe_layers(model)
    inputs: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    hooks = [
        layer.router.register_forward_pre_hook(
            lambda _module, args, seen=inputs[layer.index]: seen.append(args[0])
        )
        for layer in layers
    ]
    for example in examples:
        with torch.no_grad():
            model(torch.tensor([example.input_ids]))
    for hook in hooks:
        hook.remove()
    found = profile_model(model, examples)
    assert list(found.layers) == [layer.index for layer in layers]
    for layer in layers:
        states = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[layer.index]])
        logits = (states.double() @ layer.router.weight.double().T).tolist()
        counts, gates = [0] * layer.num_experts, [0.0] * layer.num_experts
        for token in logits:
            for expert, gate in GATES[name](token, layer).items():
                counts[expert] += 1
                gates[expert] += gate
        scores = found.layers[layer.index]
        assert (scores.experts, scores.top_k) == (layer.num_experts, layer.top_k)
        assert scores.token == pytest.approx([n / layer.top_k / len(logits) for n in counts])
        assert scores.gate == pytest.approx([g / len(logits) for g in gates], abs=1e-6)
        assert len(set(counts)) > 3  # the routers do choose


@every
def test_batching_changes_no_score(name: str) -> None:
    model, examples = tiny(name), rows()
    single = profile_model(model, examples, batch_tokens=1)
    batched = profile_model(model, examples, batch_tokens=10_000)
    for index, layer in single.layers.items():
        assert batched.layers[index].token == layer.token
        assert batched.layers[index].gate == pytest.approx(layer.gate, abs=1e-6)


def picked(name: str) -> dict[int, list[int]]:
    """Two experts of each other layer, and one of the last."""
    indices = [layer.index for layer in moe_layers(tiny(name))]
    return {index: [5, 0] for index in indices[::2]} | {indices[-1]: [3]}


@every
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_of_the_selection_are_autograd_s(name: str, implementation: str) -> None:
    model, row = tiny(name), batches(1)[0]
    model.set_experts_implementation(implementation)
    loss = model(input_ids=row, labels=row).loss
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    attach(model, Selection(experts=picked(name)))
    attached = model(input_ids=row, labels=row).loss
    attached.backward()
    assert torch.isclose(loss, attached, rtol=1e-5)
    for layer in moe_layers(model):
        for weight in layer.layout.shapes():
            for slot, expert in enumerate(picked(name).get(layer.index, [])):
                reference = expected[f"{layer.name}.{weight}"][expert]
                grad = layer.layout.banks.trained(weight).grad[slot]
                assert reference.norm() > 0
                assert (grad - reference).norm() < 1e-5 * reference.norm()


@every
def test_nothing_but_the_selection_moves(name: str) -> None:
    model, selection = tiny(name), picked(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attach(model, Selection(experts=selection))
    losses = train_steps(model, 20)
    assert losses[-1] < losses[0]
    detach(model)
    stacks = {
        f"{layer.name}.{weight}": selection.get(layer.index, [])
        for layer in moe_layers(model)
        for weight in layer.layout.shapes()
    }
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        for expert in range(tensor.shape[0]) if stacks.get(key) else ():
            same = torch.equal(tensor[expert], before[key][expert])
            assert same == (expert not in stacks[key]), (key, expert)
        if not stacks.get(key):
            assert torch.equal(tensor, before[key]), key


@every
def test_saving_an_attached_model_saves_an_ordinary_one(name: str, tmp_path: Path) -> None:
    model = attach(tiny(name), Selection(experts=picked(name)))
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    saved, detached = load(tmp_path).state_dict(), detach(model).state_dict()
    assert saved.keys() == detached.keys() == tiny(name).state_dict().keys()
    for key, tensor in detached.items():
        assert torch.equal(saved[key], tensor), key


@every
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
def test_the_merge_is_the_trained_model(name: str, shards: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(name).to(torch.bfloat16).save_pretrained(base, **shards)
    scores = profile_model(load(base), rows())
    selection = select(scores, metric="gate", p=0.3)
    trained = train_delta(base, tmp_path / "delta", selection.experts)
    merged = load(esft.merge(base, tmp_path / "delta", tmp_path / "merged"))
    state, original = merged.state_dict(), load(base).state_dict()
    moved = {key for key, tensor in state.items() if not torch.equal(tensor, original[key])}
    assert moved == {
        f"{layer.name}.{weight}"
        for layer in moe_layers(merged)
        for weight in layer.layout.shapes()
        if selection.experts.get(layer.index)
    }
    for key, tensor in trained.state_dict().items():
        assert torch.equal(state[key], tensor), key
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(merged(ids).logits, trained(ids).logits)
    esft.verify(base, tmp_path / "delta", tmp_path / "merged")


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, and a task, in one folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_tokenizer()
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    model = tiny(request.param, vocab_size=BYTES, pad_token_id=tokenizer.pad_token_id, **special)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    task = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(12)]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task))
    return folder


def test_a_process_of_its_own_knows_the_models(tmp_path: Path) -> None:
    tiny("moeut").config.save_pretrained(tmp_path)
    done = esft_process("inspect", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model_type"] == "moeut"
    assert len(found["layers"]) == 6


def test_the_commands(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"model: {checkpoint}\n"
        f"data: {{train: {checkpoint}/task.jsonl, eval: {checkpoint}/task.jsonl, max_length: 32}}\n"
        f"selection: {tmp_path}/selection.json\n"
        "training: {max_steps: 6, learning_rate: 1e-2, per_device_train_batch_size: 4}\n"
    )
    for arguments in (
        ("profile", checkpoint, "--data", checkpoint / "task.jsonl", "--out", tmp_path / "s.json"),
        ("select", tmp_path / "s.json", "--p", 0.3, "--out", tmp_path / "selection.json"),
        ("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run"),
        ("merge", checkpoint, tmp_path / "run" / "delta", "--out", tmp_path / "merged"),
        ("verify", checkpoint, tmp_path / "run" / "delta"),
        ("generate", tmp_path / "merged", "--prompt", "3:"),
    ):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    experts = json.loads((tmp_path / "selection.json").read_text())["experts"]
    before = original.state_dict()
    stacks = {
        f"{layer.name}.{weight}": layer.index
        for layer in moe_layers(merged)
        for weight in layer.layout.shapes()
    }
    for key, tensor in merged.state_dict().items():
        rows = {n for n in range(len(tensor)) if not torch.equal(tensor[n], before[key][n])}
        assert rows == (set(experts[str(stacks[key])]) if key in stacks else set()), key

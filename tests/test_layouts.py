"""Families outside the experts interface, and experts in lists of modules, through the whole chain.

The oracle for gradients is ordinary autograd on the family's own, untouched model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from esft.delta import attach_delta
from esft.errors import ModelError, SelectionError
from esft.experts import attach, attached_layers, detach
from esft.merging import merge, verify
from esft.methods import LoraMethod
from esft.moe import inspect, moe_layers, trainable_parameters
from esft.recipe_sections import LoraSpec
from esft.selection import Selection
from esft.training import train
from tests.checkpoints import save_tiny
from tests.deltas import PICKED, load, save_base, train_delta
from tests.models import EXPERTS, HIDDEN, INNER, tiny
from tests.remote_code.modeling_listed import ListedConfig, ListedForCausalLM
from tests.training_loop import batches, train_steps

# Family -> where an expert's weights are in its own state dict, `{}` the layer.
STACKS: dict[str, list[str]] = {
    "dbrx": [f"transformer.blocks.{{}}.ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")],
    "jetmoe": [f"model.layers.{{}}.mlp.{name}_linear.weight" for name in ("input", "output")],
    "llama4_text": [
        f"model.layers.{{}}.feed_forward.experts.{name}_proj" for name in ("gate_up", "down")
    ],
    "longcat_flash": [f"model.layers.{{}}.mlp.experts.{name}_proj" for name in ("gate_up", "down")],
}
LISTED = [
    f"model.layers.{{}}.mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")
]
EVERY = [*STACKS, "listed"]


def model_of(family: str) -> Any:
    if family != "listed":
        return tiny(family)
    stacked = tiny("deepseek_v2")
    model = ListedForCausalLM(ListedConfig(**stacked.config.to_dict())).eval()
    weights = stacked.state_dict()
    for layer in (1, 2):
        experts = f"model.layers.{layer}.mlp.experts."
        both, down = weights.pop(f"{experts}gate_up_proj"), weights.pop(f"{experts}down_proj")
        for expert in range(EXPERTS):
            gate, up = both[expert].chunk(2)
            for name, value in (("gate", gate), ("up", up), ("down", down[expert])):
                weights[f"{experts}{expert}.{name}_proj.weight"] = value
    model.load_state_dict(weights)
    return model


def of_expert(family: str, tensors: dict[str, Tensor], layer: int, expert: int) -> list[Tensor]:
    """Cut one expert's weights out of a model's own tensors."""
    if family == "listed":
        return [tensors[name.format(layer, expert)] for name in LISTED]
    stacks = [tensors[name.format(layer)] for name in STACKS[family]]
    if family == "dbrx":
        return [stack[expert * INNER : (expert + 1) * INNER] for stack in stacks]
    return [stack[expert] for stack in stacks]


def names_of(family: str, layer: int) -> set[str]:
    if family == "listed":
        return {name.format(layer, expert) for name in LISTED for expert in range(EXPERTS)}
    return {name.format(layer) for name in STACKS[family]}


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Ordinary autograd with everything trainable."""
    model = copy.deepcopy(model).requires_grad_(True)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("family", EVERY)
def test_gradients_are_those_of_the_family_s_own_code(family: str) -> None:
    model, ids = model_of(family), batches(1)[0]
    expected = gradients(model, ids)
    loss = model(input_ids=ids, labels=ids).loss
    # A copy of an attached model is a model of its own.
    attached = copy.deepcopy(attach(model, Selection(experts=PICKED)))
    attached_loss = attached(input_ids=ids, labels=ids, use_cache=False).loss
    attached_loss.backward()
    assert torch.isclose(loss, attached_loss, rtol=1e-6)
    compared = 0
    for found in attached_layers(attached):
        for slot, expert in enumerate(found.banks.selected):
            reference = of_expert(family, expected, found.layer.index, expert)
            for name, value in zip(found.banks.names, reference, strict=True):
                grad = found.banks.trained(name).grad[slot]
                assert grad.shape == value.shape
                # An expert that no token chose has none.
                assert (grad - value).norm() <= 1e-5 * value.norm()
                compared += bool(value.norm() > 0)
    assert compared >= 2 * len(found.banks.names)
    assert all(p.grad is None for p in trainable_parameters(model).values())


@pytest.mark.parametrize("family", EVERY)
def test_nothing_but_the_selection_moves(family: str) -> None:
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, Selection(experts=PICKED))
    losses = train_steps(model, 11)  # ends on the batch that it began with
    assert losses[-1] < losses[0]
    shown = model.state_dict()
    detach(model)
    after = model.state_dict()
    assert after.keys() == shown.keys() == before.keys()
    assert all(torch.equal(after[name], shown[name]) for name in after)
    for layer in range(3):
        names = names_of(family, layer)
        moved = {
            name for name in names & after.keys() if not torch.equal(after[name], before[name])
        }
        assert bool(moved) == (layer in PICKED)
        for expert in range(EXPERTS if layer in PICKED else 0):
            pairs = zip(
                of_expert(family, after, layer, expert),
                of_expert(family, before, layer, expert),
                strict=True,
            )
            same = {torch.equal(new, old) for new, old in pairs}
            assert same == {expert not in PICKED[layer]}
    others = set(after) - {name for layer in range(3) for name in names_of(family, layer)}
    for name in others:
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("family", EVERY)
def test_gradients_and_optimizer_state_exist_for_the_selection_only(family: str) -> None:
    model = attach(model_of(family).to(torch.bfloat16), Selection(experts=PICKED))
    parameters = trainable_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == 3 * 3 * HIDDEN * INNER
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(parameters.values())
    ids = batches(1)[0]
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in parameters)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(parameters)
    state = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    assert sum(t.numel() for t in state) <= 2 * 3 * 3 * HIDDEN * INNER


# Transformers' JetMoE does not support it.
@pytest.mark.parametrize("family", [family for family in EVERY if family != "jetmoe"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = attach(model_of(family), Selection(experts=PICKED)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = batches(1)[0]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("family", STACKS)
def test_delta_and_merge_give_the_trained_model(family: str, tmp_path: Path) -> None:
    """Weights bitwise, by plain transformers; logits with cloned parameters."""
    base = save_base(tmp_path / "base", family)
    trained = train_delta(base, tmp_path / "delta")
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert verify(base, tmp_path / "delta", merged).changed > 0
    again = load(merged)
    expected = trained.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, trained(ids).logits)
    # And every other tensor of the files is the base's, to the byte.
    old, new = (load_file(folder / "model.safetensors") for folder in (base, merged))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert all(any(f".{layer}." in name for layer in PICKED) for name in changed)
    attached = attach_delta(load(base), base, tmp_path / "delta")
    for name, tensor in attached.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("family", EVERY)
def test_saving_an_attached_model_saves_an_ordinary_one(family: str, tmp_path: Path) -> None:
    model = attach(model_of(family), Selection(experts=PICKED))
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path).state_dict()
    detached = detach(model).state_dict()
    assert detached.keys() == saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in detached.items())


@pytest.mark.parametrize("family", EVERY)
def test_anatomy(family: str) -> None:
    model = model_of(family)
    plain = inspect(model)
    assert [layer.index for layer in plain.layers] == ([1, 2] if family == "listed" else [0, 1, 2])
    assert plain.per_expert == 3 * HIDDEN * INNER
    assert plain.routed == len(plain.layers) * EXPERTS * plain.per_expert
    attach(model, Selection(experts=PICKED))
    found = inspect(model)
    assert (found.per_expert, found.routed) == (plain.per_expert, plain.routed)
    assert found.to_dict()["layers"] == plain.to_dict()["layers"]


def test_jetmoe_s_attention_experts_stay_frozen() -> None:
    model = attach(tiny("jetmoe"), Selection(experts=PICKED))
    attention = [p for name, p in model.named_parameters() if ".self_attention." in name]
    assert attention
    assert not any(p.requires_grad for p in attention)


def test_longcat_s_zero_computation_experts_cannot_be_selected() -> None:
    model = tiny("longcat_flash")
    assert model.config.zero_expert_num == 4
    assert moe_layers(model)[0].experts.gate_up_proj.shape[0] == EXPERTS + 4
    with pytest.raises(SelectionError, match="expert 8"):
        attach(model, Selection(experts={1: [EXPERTS]}))


def test_experts_of_different_kinds_in_a_list_are_refused() -> None:
    model = model_of("listed")
    model.model.layers[1].mlp.experts[3].up_proj = torch.nn.Linear(HIDDEN, INNER, bias=True)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts: expert 3 .* cannot train"):
        attach(model, Selection(experts=PICKED))
    assert all(p.requires_grad for p in model.parameters())  # left as it was


@pytest.mark.parametrize("family", ["dbrx", "longcat_flash"])
def test_a_whole_run(family: str, tmp_path: Path) -> None:
    """Profile, select, train, merge: rows of a fused tensor; choices of no expert."""
    base, data = save_tiny(tmp_path / "base", family), tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n}:", "completion": "abcdef"[n % 6] * 3} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(base),
        "data": {"train": str(data), "max_length": 32},
        "selection": {"metric": "token", "p": 0.4},
        "training": {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
    }
    result = train(recipe, tmp_path / "run")
    picked = Selection.read(tmp_path / "run" / "selection.json").experts
    merged = merge(base, result.delta, tmp_path / "merged")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, merged))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    if family == "dbrx":
        assert changed == {name.format(layer) for name in STACKS["dbrx"] for layer in picked}
        for layer, experts in picked.items():
            for name in STACKS["dbrx"]:
                rows_ = (old[name.format(layer)] != new[name.format(layer)]).any(1).nonzero()
                assert {int(row) // INNER for row in rows_} == set(experts)
    else:
        assert {tuple(name.split(".")[2:6:3]) for name in changed} == {
            (str(layer), str(expert)) for layer, experts in picked.items() for expert in experts
        }


def test_lora_leaves_routers_alone_that_have_a_linear_layer_inside() -> None:
    model = LoraMethod(LoraSpec(target_parameters=[])).prepare(tiny("dbrx"))
    trained = trainable_parameters(model)
    assert trained
    assert not any("router" in name for name in trained)

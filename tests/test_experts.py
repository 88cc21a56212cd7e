"""Attaching a selection: the gradients are autograd's, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from esft_kernels import SwiGLU

from esft.errors import ModelError, SelectionError
from esft.experts import attach, attached_layers, attached_selection, detach
from esft.layouts.interface import attached_bank
from esft.moe import moe_layers, trainable_parameters
from esft.selection import Selection
from tests.models import FAMILIES, HIDDEN, INNER, tiny
from tests.training_loop import batches, train_steps

PICKED = {1: [5, 0], 2: [3]}


def selection(experts: dict[int, list[int]] = PICKED) -> Selection:
    return Selection(experts=experts)


def gradients_of_everything(model, ids) -> dict[tuple[int, str], torch.Tensor]:
    """Ordinary autograd with whole stacks trainable: the oracle. `{(layer, stack): [E, ...]}`."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        (layer.index, name): stack.grad
        for layer in moe_layers(model)
        for name, stack in layer.experts.named_parameters(recurse=False)
    }


# The last two: transposed and interleaved with biases; no gate.
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradients_equal_ordinary_autograd(family, implementation):
    model = tiny(family)
    model.set_experts_implementation(implementation)
    ids = batches(1)[0]
    expected = gradients_of_everything(model, ids)
    stacks = {name for _, name in expected}
    loss = model(input_ids=ids, labels=ids).loss
    attach(model, selection())
    attached_loss = model(input_ids=ids, labels=ids).loss
    attached_loss.backward()
    assert torch.isclose(loss, attached_loss, rtol=1e-6)
    compared = 0
    for attached in attached_layers(model):
        for name, bank in attached.banks.trainable.items():
            for slot, expert in enumerate(attached.banks.selected):
                reference = expected[attached.layer.index, name][expert]
                assert reference.norm() > 0
                error = (bank.grad[slot] - reference).norm() / reference.norm()
                assert error < 1e-5
                compared += 1
    assert len(stacks) == (4 if family == "gpt_oss" else 2)  # biases are stacks of their own
    assert compared == len(stacks) * sum(map(len, PICKED.values()))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_a_whole_model_through_the_triton_kernels(family, monkeypatch):
    """Each kind of path in them: SwiGLU; transposed, interleaved, with biases; no gate."""
    model = attach(tiny(family), selection())
    ids = batches(1)[0][:1]
    found = {}
    for path in ("grouped", "triton"):
        monkeypatch.setenv("ESFT_KERNELS", path)
        loss = model(input_ids=ids, labels=ids).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        found[path] = [loss.detach(), *torch.autograd.grad(loss, trained)]
    for expected, value in zip(*found.values(), strict=True):
        assert expected.norm() > 0
        assert (value - expected).norm() / expected.norm() < 1e-5


def test_swiglu_is_fused_where_a_family_computes_it_and_nowhere_else():
    """The models' own classes say so; that it is the same function, the gradients above say."""
    expected = {"qwen3_moe": True, "deepseek_v2": True, "gpt_oss": False, "nemotron_h": False}
    for family, fused in expected.items():
        model = attach(tiny(family), selection())
        experts = moe_layers(model)[0].experts
        assert isinstance(attached_bank(experts).activation, SwiGLU) == fused


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("trains", [True, False])
def test_the_experts_implementation_by_itself(family, trains):
    """Without a selection: whole stacks, trained or frozen, as with transformers' own."""
    model = tiny(family)
    ids = batches(1)[0]
    found = {}
    for implementation in ("eager", "esft"):
        model.set_experts_implementation(implementation)
        for layer in moe_layers(model):
            layer.experts.requires_grad_(trains)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[implementation] = [loss.detach(), *grads]
    assert len(found["eager"]) == len(found["esft"])
    for expected, value in zip(*found.values(), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_selection_moves(family):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, selection())
    losses = train_steps(model, 20)
    assert losses[-1] < losses[0]
    detach(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    stacks = {f"{layer.name}.": layer.index for layer in moe_layers(model)}
    for name, tensor in after.items():
        layer = next((index for prefix, index in stacks.items() if name.startswith(prefix)), None)
        picked = PICKED.get(layer, []) if layer is not None else []
        if not picked:
            assert torch.equal(tensor, before[name]), name
            continue
        for expert in range(tensor.shape[0]):
            same = torch.equal(tensor[expert], before[name][expert])
            assert same == (expert not in picked), (name, expert)


def test_gradients_and_optimizer_state_exist_for_selected_experts_only():
    model = attach(tiny("qwen3_moe"), selection())
    parameters = trainable_parameters(model)
    ids = batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(parameters)
    per_expert = 3 * HIDDEN * INNER
    assert sum(p.numel() for p in parameters.values()) == 3 * per_expert
    assert all(p.dtype == torch.float32 for p in parameters.values())
    optimizer = torch.optim.AdamW(parameters.values())
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.dim() > 0]
    assert sum(t.numel() for t in state) == 2 * 3 * per_expert


def test_bf16_model_keeps_an_fp32_bank_and_small_updates():
    """At 1e-5 a bf16 parameter near 0.2 cannot move: half a unit in the last place is 5e-4."""
    model = tiny("qwen3_moe").to(torch.bfloat16)
    attach(model, selection())
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    train_steps(model, 5, lr=1e-5)
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[name]).float().mean() > 0.9, name


def test_gradients_flow_through_frozen_experts_and_gates():
    """A trained expert in the first MoE layer is reached through all later frozen layers."""
    ids = batches(1)[0]
    model = tiny("deepseek_v2")
    expected = gradients_of_everything(model, ids)[1, "down_proj"][2]
    attach(model, selection({1: [2]}))
    model(input_ids=ids, labels=ids).loss.backward()
    grad = attached_layers(model)[0].banks.trainable["down_proj"].grad[0]
    assert (grad - expected).norm() / expected.norm() < 1e-5


def test_detach_restores_names_config_and_bits():
    model = tiny("olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = [layer.experts.config for layer in moe_layers(model)]
    implementation = model.config._experts_implementation
    attach(model, selection())
    assert model.config._experts_implementation == implementation
    detach(model)
    assert [layer.experts.config for layer in moe_layers(model)] == configs
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after.keys() == before.keys()


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = attach(tiny("qwen3_moe"), selection())
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = batches(1)[0]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("experts", "message"),
    [({9: [0]}, "layer 9"), ({1: [8]}, "8"), ({1: [-1]}, "-1"), ({1: [2, 2]}, "2")],
)
def test_a_selection_that_does_not_fit_is_refused(experts, message):
    with pytest.raises(SelectionError, match=message):
        attach(tiny("mixtral"), selection(experts))


def test_stacks_that_cannot_train_are_refused():
    """As a quantiser leaves them: int8 numbers, or experts packed along another dimension."""
    for change, message in (
        (lambda stack: stack.to(torch.int8), r"shape \[8, 32, 24\], torch\.int8"),
        (lambda stack: stack.reshape(16, 16, 24), r"shape \[16, 16, 24\]"),
    ):
        model = tiny("qwen3_moe")
        experts = moe_layers(model)[2].experts
        stack = change(experts.down_proj.detach())
        experts.down_proj = torch.nn.Parameter(stack, requires_grad=False)
        with pytest.raises(
            ModelError, match=r"layers\.2\.mlp\.experts\.down_proj: not a float"
        ) as e:
            attach(model, selection())
        assert e.match(message)
        assert not any(hasattr(layer.experts, "esft") for layer in moe_layers(model))


def test_experts_that_do_more_than_the_interface_tells_are_refused():
    for flag, message in (
        ("has_post_expert_norm", "a norm after them"),
        ("_is_expert_parallel", "expert parallelism"),
    ):
        model = tiny("mixtral")
        setattr(moe_layers(model)[1].experts, flag, True)
        with pytest.raises(ModelError, match=rf"layers\.1\.mlp\.experts: .*{message}"):
            attach(model, selection())


def test_attaching_twice_and_detaching_nothing_are_refused():
    model = attach(tiny("mixtral"), selection())
    with pytest.raises(ModelError, match="attached already"):
        attach(model, selection())
    with pytest.raises(ModelError, match="no selection"):
        detach(tiny("mixtral"))


def test_a_selection_is_attached_from_its_file_and_remembered(tmp_path):
    selection().write(tmp_path / "selection.json")
    model = attach(tiny("mixtral"), tmp_path / "selection.json")
    assert {a.layer.index: a.banks.selected for a in attached_layers(model)} == {0: [], **PICKED}
    assert attached_selection(model) == selection()
    with pytest.raises(ModelError, match=r"no selection is attached .* call esft\.attach"):
        attached_selection(detach(model))
    with pytest.raises(SelectionError, match=r"missing\.json: no such selection file"):
        attach(model, str(tmp_path / "missing.json"))


def test_saving_an_attached_model_saves_an_ordinary_one(tmp_path):
    """A loop of the user's own may call `save_pretrained` without detaching first."""
    model = attach(tiny("deepseek_v2"), selection())
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    detached = detach(model)
    assert detached.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in detached.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name

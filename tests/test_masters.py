"""fp32 masters: the module computes as before; training, saving and copies see what they must."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from esft.experts import attach, detach
from esft.masters import add_masters, remove_masters
from esft.moe import trainable_parameters
from tests.models import tiny
from tests.training_loop import batches, train_steps

IDS = batches(1)[0]


def bf16(family: str = "qwen3_moe", **fields: Any) -> Any:
    return tiny(family, **fields).to(torch.bfloat16)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def everything(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def test_the_model_computes_the_same_bits_in_its_own_dtype() -> None:
    model = bf16("deepseek_v2")
    before, dtype = logits(model), model.dtype
    add_masters(model, everything(model), torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(logits(model), before)
    assert logits(model).dtype == model.dtype == model.model.dtype == dtype
    assert model.lm_head.weight.dtype == dtype


def test_gradients_are_those_of_the_narrow_weights_summed_in_fp32() -> None:
    """The oracle: bf16 parameters, one backward pass each, their gradients added up in fp32."""
    narrow = bf16()
    wide = copy.deepcopy(narrow)
    add_masters(wide, everything(wide), torch.float32)
    expected: dict[str, Tensor] = {}
    for ids in batches(3):
        narrow.zero_grad()
        narrow(input_ids=ids, labels=ids).loss.backward()
        wide(input_ids=ids, labels=ids).loss.backward()
        for name, parameter in narrow.named_parameters():
            grad = parameter.grad.float()
            expected[name] = expected[name] + grad if name in expected else grad
    for name, parameter in wide.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, expected[name]), name


def test_names_and_objects_stay() -> None:
    """An optimizer, a checkpoint and a rule by name find the parameters where they were."""
    model = bf16("deepseek_v2", tie_word_embeddings=True)
    before = dict(model.named_parameters())
    handle = add_masters(model, everything(model), torch.float32)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    remove_masters(model, handle)
    assert all(model.get_parameter(name) is p for name, p in before.items())


def test_tied_weights_stay_tied(tmp_path: Any) -> None:
    model = attach(bf16(tie_word_embeddings=True), None, non_expert_modules=True)
    train_steps(model, 2)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head._parameters["weight"] is embedding._parameters["weight"]
    state = model.state_dict()
    shown = [state[name] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert shown[0].data_ptr() == shown[1].data_ptr()
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    detach(model)
    assert head.weight is embedding.weight
    assert torch.equal(saved.lm_head.weight, head.weight)


def test_a_state_dict_has_the_weights_as_the_model_computes_with_them() -> None:
    model = bf16("deepseek_v2")
    before = model.state_dict()
    add_masters(model, everything(model), torch.float32)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())


def test_saving_writes_an_ordinary_checkpoint_in_the_model_s_dtype(tmp_path: Any) -> None:
    model = attach(bf16("deepseek_v2"), None, shared_experts=True, non_expert_modules=True)
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert saved.dtype == torch.bfloat16
    detach(model)
    assert all(torch.equal(saved.state_dict()[n], t) for n, t in model.state_dict().items())


def test_updates_that_bf16_would_round_away_are_kept() -> None:
    model = attach(bf16(), None, non_expert_modules=True)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    train_steps(model, 5, lr=1e-5)
    moved = [(p != before[name]).float().mean() for name, p in trainable_parameters(model).items()]
    assert min(moved) > 0.6  # rows of the embedding that no token uses stay
    assert sum(moved) / len(moved) > 0.9


def test_removing_rounds_to_the_dtype_that_was_computed_in_and_leaves_no_trace() -> None:
    model, untouched = bf16("deepseek_v2"), bf16("deepseek_v2")
    handle = add_masters(model, everything(model), torch.float32)
    masters = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 1e-3
            masters[name] = parameter.clone()
    computed = logits(model)
    remove_masters(model, handle)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].to(torch.bfloat16)), name
    assert torch.equal(logits(model), computed)
    for module, other in zip(model.modules(), untouched.modules(), strict=True):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()
    assert not model._state_dict_hooks


def test_a_copy_is_a_model_of_its_own() -> None:
    """DPO compares with a copy of the model: taking masters off one must not break the other."""
    model = attach(bf16(), None, non_expert_modules=True)
    other = copy.deepcopy(model)
    before = logits(other)
    train_steps(model, 2)
    detach(model)
    assert torch.equal(logits(other), before)
    assert other.get_output_embeddings()._parameters["weight"].dtype == torch.float32
    assert set(other.state_dict()) == set(model.state_dict())
    detach(other)
    assert other.dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = attach(bf16(), None, non_expert_modules=True, router=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_is_wide_enough_is_left_alone() -> None:
    """In an fp32 model, and where a family keeps a router in fp32 in one that is not."""
    model = tiny("qwen3_moe")
    kinds = [type(module) for module in model.modules()]
    add_masters(model, everything(model), torch.float32)
    assert [type(module) for module in model.modules()] == kinds
    mixed = bf16()
    router = mixed.model.layers[0].mlp.gate.float()
    add_masters(mixed, everything(mixed), torch.float32)
    assert router.weight is router._parameters["weight"]


def test_a_module_that_moves_itself_to_another_dtype_computes_there() -> None:
    """As routers of Switch Transformers do in their forward pass, before they use the weight."""
    model = nn.Module()
    model.router = nn.Linear(4, 4).to(torch.bfloat16)
    add_masters(model, everything(model), torch.float32)
    assert model.router.to(torch.float32).weight.dtype == torch.float32
    assert model.router(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_one_parameter_of_a_module_alone(parameter: str) -> None:
    model = nn.Module()
    model.layer = nn.Linear(4, 4).to(torch.bfloat16)
    handle = add_masters(model, [f"layer.{parameter}"], torch.float32)
    dtypes = {name: p.dtype for name, p in model.layer.named_parameters()}
    other = {"weight": "bias", "bias": "weight"}[parameter]
    assert dtypes == {parameter: torch.float32, other: torch.bfloat16}
    assert model.layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    remove_masters(model, handle)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

"""Loading with frozen weights in few bits: which weights, of what values, and in how much memory.

The oracle is the plainly loaded model, whose frozen weights a loop in the test rounds one matrix at
a time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from esft_kernels.quantised import Quantised, quantise
from safetensors.torch import load_file, save_file

from esft.errors import ModelError
from esft.experts import attach, attached_layers, detach
from esft.loading import load_model
from esft.moe import moe_layers, trainable_parameters
from esft.quantising.checkpoint import load_quantised
from esft.quantising.parts import stored_kinds
from esft.selection import Selection
from esft.trained_parts import TrainedParts
from tests.deltas import load, save_base
from tests.models import tiny
from tests.test_families import COVERED, cloned, model_of
from tests.training_loop import batches

PICKED = {1: [5, 0], 2: [3]}
ALL = {"experts": "nf4", "linear": "int8", "embeddings": "nf4"}
FAMILIES = ("qwen3_moe", "deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h", "llama4_text")


def rounded(model: Any, stored: dict[str, str], selected: dict[int, list[int]]) -> Any:
    """Return a copy of a plain model with every stored matrix but the selected experts' rounded."""
    model = copy.deepcopy(model)
    stacks = {
        f"{layer.name}.{weight}": selected.get(layer.index, [])
        for layer in moe_layers(model)
        for weight in layer.layout.shapes()
    }
    for name, parameter in model.named_parameters():
        kind = stored.get(name)
        if kind is None:
            continue
        matrices = parameter.data if name in stacks else parameter.data[None]
        for number, matrix in enumerate(matrices):
            if number not in stacks.get(name, []):
                matrix.copy_(quantise(matrix.clone(), kind).dequantise())
    return model


def loaded(folder: Path, kinds: dict[str, str], picked: dict[int, list[int]], **how: Any) -> Any:
    model = load_quantised(folder, kinds, TrainedParts(), dtype="checkpoint", **how)
    return attach(model, Selection(experts=picked))


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = batches(1)[0]
    found = model(input_ids=ids, labels=ids)
    found.loss.backward()
    grads = {name: p.grad for name, p in trainable_parameters(model).items()}
    return found.logits.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_model_with_rounded_frozen_weights_computes(
    tmp_path: Path, family: str
) -> None:
    tiny(family).save_pretrained(tmp_path)
    plain = load(tmp_path)
    stored = stored_kinds(plain, moe_layers(plain), ALL, TrainedParts())
    logits, grads = gradients(loaded(tmp_path, ALL, PICKED))
    oracle = attach(rounded(plain, stored, PICKED), Selection(experts=PICKED))
    expected, its = gradients(oracle)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert grads.keys() == its.keys()
    for name, grad in its.items():
        assert grad.norm() > 0 or "bias" in name
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(COVERED) - {"switch_transformers"}))
def test_every_family_is_loaded_so_or_refused_with_a_reason(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path)
    plain = cloned(load_model(tmp_path, dtype="checkpoint"))
    layers = moe_layers(plain)
    picked = {layer.index: [5, 0] for layer in layers[-1:]}
    if not all(layer.layout.takes_blocks for layer in layers):
        with pytest.raises(ModelError, match="experts cannot be kept in 8 or 4 bits"):
            loaded(tmp_path, ALL, picked)
        kinds = {"linear": "nf4"}
    else:
        kinds = ALL
    stored = stored_kinds(plain, layers, kinds, TrainedParts())
    expected = rounded(plain, stored, picked)
    ids = batches(1)[0]
    with torch.no_grad():
        mine = loaded(tmp_path, kinds, picked)(input_ids=ids).logits
        its = attach(expected, Selection(experts=picked))(input_ids=ids).logits
    assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_selected_experts_begin_as_the_base_has_them(tmp_path: Path, kind: str) -> None:
    save_base(tmp_path)
    model = loaded(tmp_path, {"experts": kind, "linear": kind}, PICKED)
    disk = {}
    for file in tmp_path.glob("*.safetensors"):
        disk |= load_file(file)
    seen = 0
    for attached in attached_layers(model):
        banks, prefix = attached.banks, f"model.layers.{attached.layer.index}.mlp.experts"
        for slot, expert in enumerate(banks.selected):
            gate_up = [disk[f"{prefix}.{expert}.{half}_proj.weight"] for half in ("gate", "up")]
            down = disk[f"{prefix}.{expert}.down_proj.weight"]
            assert banks.bank("gate_up_proj").dtype == torch.float32
            assert torch.equal(banks.bank("gate_up_proj")[slot], torch.cat(gate_up).float())
            assert torch.equal(banks.bank("down_proj")[slot], down.float())
            seen += 1
    assert seen == 3


def test_what_is_stored_of_a_model_by_part(tmp_path: Path) -> None:
    model = tiny("deepseek_v2")
    layers = moe_layers(model)

    def stored(trained: TrainedParts | None = None, **kinds: str) -> set[str]:
        return set(stored_kinds(model, layers, kinds, trained or TrainedParts()))

    attention = {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer in range(3)
        for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    mlp = ("gate_proj", "up_proj", "down_proj")
    dense = {f"model.layers.0.mlp.{name}.weight" for name in mlp}
    shared = {f"model.layers.{n}.mlp.shared_experts.{m}.weight" for n in (1, 2) for m in mlp}
    experts = {
        f"model.layers.{n}.mlp.experts.{name}"
        for n in (1, 2)
        for name in ("gate_up_proj", "down_proj")
    }
    assert stored(linear="int8") == attention | dense | shared
    assert stored(experts="nf4") == experts
    assert stored(embeddings="nf4") == {"model.embed_tokens.weight", "lm_head.weight"}
    assert stored(linear="nf4", trained=TrainedParts(shared_experts=True)) == attention | dense
    assert stored(linear="nf4", trained=TrainedParts(non_expert_modules=True)) == shared
    assert stored(embeddings="nf4", trained=TrainedParts(non_expert_modules=True)) == set()


def test_gates_of_shared_experts_and_routers_stay_exact() -> None:
    model = model_of("qwen2_moe")
    kinds = stored_kinds(model, moe_layers(model), ALL, TrainedParts())
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in kinds
    ]
    exact = (".mlp.gate.weight", ".mlp.shared_expert_gate.weight")
    assert {end for end in exact for name in left if name.endswith(end)} == set(exact)
    assert all(name.endswith(exact) for name in left)


def test_tied_embeddings_are_one_stored_weight(tmp_path: Path) -> None:
    tiny("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    model = loaded(tmp_path, {"embeddings": "nf4"}, PICKED)
    below, above = model.get_input_embeddings().stored, model.get_output_embeddings().stored
    assert below.codes.data_ptr() == above.codes.data_ptr()
    assert all("lm_head" not in name for name, _ in model.named_parameters())
    plain = load(tmp_path)
    stored = stored_kinds(plain, moe_layers(plain), {"embeddings": "nf4"}, TrainedParts())
    assert set(stored) == {"model.embed_tokens.weight", "lm_head.weight"}
    expected = attach(rounded(plain, stored, {}), Selection(experts=PICKED))
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_the_model_says_the_dtype_that_it_computes_in(tmp_path: Path) -> None:
    # Without embeddings and linear layers, the first parameter may be an expert's, in fp32.
    for family in ("qwen3_moe", "deepseek_v2", "gpt_oss", "llama4_text"):
        save_base(tmp_path / family, family)
        assert loaded(tmp_path / family, ALL, {n: [1] for n in (1, 2)}).dtype == torch.bfloat16


def test_it_cannot_be_made_whole_again(tmp_path: Path) -> None:
    save_base(tmp_path)
    model = loaded(tmp_path, {"experts": "nf4"}, PICKED)
    for attempt in (detach, lambda model: model.state_dict()):
        with pytest.raises(ModelError, match=r"kept in nf4 \(frozen_dtype\)"):
            attempt(model)


def test_a_model_of_which_nothing_is_frozen_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path)
    parts = TrainedParts(non_expert_modules=True)
    with pytest.raises(ModelError, match="frozen_dtype: nothing of linear is frozen in this run"):
        load_quantised(tmp_path, {"linear": "nf4"}, parts)


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    save_base(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        loaded(tmp_path, {"experts": "nf4"}, PICKED)
    message = "tensor model.layers.1.mlp.experts.gate_up_proj, expert 3 cannot be kept in nf4: "
    assert str(caught.value).startswith(message)
    # Selected, it is not rounded; that it trains to nothing is found out by the first loss.
    loaded(tmp_path, {"experts": "nf4"}, {1: [3]})


def test_only_what_is_selected_has_a_gradient(tmp_path: Path) -> None:
    save_base(tmp_path)
    model = loaded(tmp_path, ALL, PICKED)
    gradients(model)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == set(trainable_parameters(model))
    assert all(".esft.trainable." in name for name in trained)
    for attached in attached_layers(model):
        for name in attached.banks.names:
            assert isinstance(attached.banks.rest(name), Quantised)

"""Low-rank factors of selected experts: their gradients, where they begin, what they lead to."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from esft.changes import expert_changes
from esft.delta import attach_delta
from esft.errors import ModelError
from esft.experts import attach, attached_layers, detach
from esft.fingerprint import fingerprint
from esft.low_rank import LowRank, add_low_rank, disk_factors
from esft.low_rank_delta import write_low_rank_delta
from esft.low_rank_sum import summed
from esft.merging import merge
from esft.methods import HotLoraMethod
from esft.moe import moe_layers, trainable_parameters
from esft.recipe_sections import LoraSpec
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.models import tiny
from tests.models_of_ours.tiny_models import tiny as own
from tests.test_families import model_of as family_model
from tests.test_layouts import EVERY, model_of
from tests.training_loop import batches, train_steps

PICKED = {1: [5, 0], 2: [3]}
RANK, ALPHA = 3, 12


def adapted(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Attach factors to a model, all of them random."""
    attach(model, Selection(experts=PICKED), param_dtype=None)
    add_low_rank(model, r=RANK, alpha=ALPHA, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def factors_of(model: Any) -> dict[tuple[int, str], LowRank]:
    return {
        (found.layer.index, name): found.banks.factors(name)
        for found in attached_layers(model)
        for name in found.banks.names
        if found.banks.factors(name) is not None
    }


def grown(plain: Any, model: Any) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Make weights for a family's own code of copies of the factors, by its names of them.

    Returns:
        The weights, and each factor with the copy that they were made of.
    """
    weights = {name: p.detach().clone() for name, p in plain.named_parameters()}
    copies = []
    for found in attached_layers(model):
        layout, selected = found.layer.layout, found.banks.selected
        for name in found.banks.names:
            factors = found.banks.factors(name)
            if not isinstance(factors, LowRank):
                continue
            parts = []
            for pair in zip(factors.left, factors.right, strict=True):
                left, right = (factor.detach().clone().requires_grad_() for factor in pair)
                copies += list(zip(pair, (left, right), strict=True))
                parts.append(ALPHA / RANK * left @ right)
            # Parts of a weight follow each other by rows: gate before up.
            added = torch.cat(parts, dim=1).reshape(found.banks.bank(name).shape)
            names = layout.tensor_names(name)
            if len(names) > 1:
                for slot, expert in enumerate(selected):
                    weights[names[expert]] = weights[names[expert]] + added[slot]
                continue
            stack = weights[names[0]]
            each = layout.disk_rows() or 1  # DBRX has the rows of all experts in one matrix
            by_expert = stack.unflatten(0, (-1, each)) if each > 1 else stack
            by_expert = by_expert.index_add(0, torch.tensor(selected), added)
            weights[names[0]] = by_expert.reshape(stack.shape)
    return weights, copies


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "gpt_oss", "granitemoe", *EVERY])
def test_gradients_are_those_of_autograd_on_the_family_s_own_code(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESFT_KERNELS", "naive")  # torch's grouped_mm has no float64
    plain = model_of(family) if family in EVERY else tiny(family)
    plain.config._experts_implementation = "eager"
    plain = plain.double().requires_grad_(False)
    model = adapted(copy.deepcopy(plain))
    ids = batches(1)[0]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()

    weights, copies = grown(plain, model)
    expected = functional_call(plain, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    expected.backward()

    assert torch.isclose(loss, expected, rtol=1e-10)
    assert len(copies) >= 4 * len(PICKED)
    for parameter, leaf in copies:
        assert leaf.grad is not None
        assert leaf.grad.norm() > 0
        assert (parameter.grad - leaf.grad).norm() <= 1e-9 * leaf.grad.norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_gradients_of_the_kernels_in_float32_are_those_in_float64(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, ids = adapted(tiny(family), torch.float32), batches(1)[0]
    double = copy.deepcopy(single).double()
    double.config._experts_implementation = "eager"
    single(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    monkeypatch.setenv("ESFT_KERNELS", "naive")
    double(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = trainable_parameters(double)
    for name, parameter in trainable_parameters(single).items():
        assert parameter.grad is not None
        grad = expected[name].grad
        assert (parameter.grad.double() - grad).norm() <= 1e-4 * grad.norm(), name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dbrx", "llama4_text", "listed"])
def test_training_begins_at_the_base(family: str) -> None:
    torch.manual_seed(1)
    plain = model_of(family) if family in EVERY else tiny(family)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = attach(plain, Selection(experts=PICKED), param_dtype=None)
    add_low_rank(model, r=RANK, alpha=ALPHA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    turned = {"gpt_oss": ("gate_up_proj", "down_proj"), "dbrx": ("mlp.w2",)}
    turned["llama4_text"] = turned["gpt_oss"]
    seen = set()
    for (_, name), factors in factors_of(model).items():
        for left, right in zip(factors.left, factors.right, strict=True):
            # The factor that the expert's input meets is random, and none repeats another's.
            random, zero = (left, right) if name in turned.get(family, ()) else (right, left)
            side = random.shape[1] if random is left else random.shape[2]
            assert torch.equal(zero, torch.zeros_like(zero))
            assert 0.9 * side**-0.5 < random.abs().max() <= side**-0.5
            assert len(torch.unique(random)) > 0.9 * random.numel()
            seen.add(name)
    assert seen == {n for n in attached_layers(model)[-1].banks.names if "bias" not in n}


def test_only_factors_train_and_everything_else_keeps_its_bits() -> None:
    model = tiny("gpt_oss").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, Selection(experts=PICKED), param_dtype=None)
    add_low_rank(model, r=RANK, alpha=ALPHA)
    assert {".low_rank." in name for name in trainable_parameters(model)} == {True}
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    # What does not train is not widened, and no expert is a parameter of a trained one's size.
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    losses = train_steps(model, 11)  # ends on the batch that it began with
    assert losses[-1] < losses[0]
    after = detach(model).state_dict()
    for name, tensor in after.items():
        rows = (
            (tensor != before[name]).flatten(1).any(1) if tensor.dim() == 3 else tensor.new_zeros(1)
        )
        layer = int(name.split(".")[2]) if "layers" in name else -1
        if name.endswith("proj") and tensor.dim() == 3 and layer in PICKED:
            assert set(rows.nonzero().flatten().tolist()) == set(PICKED[layer]), name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_sum_is_rounded_once_from_float64(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 4, generator=generator).to(dtype)
    left, right = (torch.randn(2, *s, generator=generator) for s in ((5, 3), (3, 4)))
    found = summed(weight, left, right, 0.7)
    for n in range(2):
        for i in range(5):
            for j in range(4):
                product = sum(float(left[n, i, k]) * float(right[n, k, j]) for k in range(3))
                exact = torch.tensor(float(weight[n, i, j]) + 0.7 * product, dtype=torch.float64)
                if dtype != torch.float64:
                    exact = exact.float().to(dtype)
                assert torch.isclose(found[n, i, j], exact, rtol=1e-15, atol=0)
    # However many slices are taken at once, and in another shape.
    assert torch.equal(found[1], summed(weight[1], left[1], right[1], 0.7))
    flat = summed(weight.flatten(0, 1), left, right, 0.7)
    assert torch.equal(flat, found.flatten(0, 1))


def test_flags_of_a_selection_do_not_make_hot_lora_train_more() -> None:
    flagged = Selection(experts=PICKED, shared_experts=True, non_expert_modules=True)
    prepared = HotLoraMethod(flagged, LoraSpec()).prepare(tiny("deepseek_v2"))
    assert {".low_rank." in name for name in trainable_parameters(prepared)} == {True}


def test_there_must_be_something_to_adapt() -> None:
    with pytest.raises(ModelError, match="no selection is attached"):
        add_low_rank(tiny("qwen3_moe"), r=2, alpha=4)


# Families whose checkpoints have stacks the other way round (transformers turns these when it loads
# them), gate and up row by row in turns, or a tensor an expert; and one with one matrix an expert.
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "inkling2_text", "jamba", "moeut"])
def test_what_is_on_disk_leads_to_what_was_trained(name: str, tmp_path: Path) -> None:
    made = own(name) if name == "moeut" else family_model(name)
    base, delta = tmp_path / "base", tmp_path / "delta"
    made.save_pretrained(base)
    if name == "qwen3_vl_moe":
        file = base / "model.safetensors"
        stored = load_file(file)
        turned = {n: t.mT.contiguous() for n, t in stored.items() if ".mlp.experts." in n}
        save_file(stored | turned, file, metadata={"format": "pt"})
    plain = type(made).from_pretrained
    model, prints = plain(base, dtype="auto"), fingerprint(open_checkpoint(base))
    picked = {layer.index: [1, 0] for layer in moe_layers(model)[:2]}
    attach(model, Selection(experts=picked), param_dtype=None)
    add_low_rank(model, r=2, alpha=4)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    changes, factors = expert_changes(model, prints), list(disk_factors(model, prints))
    delta.mkdir()
    about = {"method": "hot-lora", "base": {}}
    write_low_rank_delta(delta, prints, changes, factors, about, r=2, alpha=4)
    trained, before = detach(model).state_dict(), plain(base, dtype="auto").state_dict()
    merged = plain(merge(base, delta, tmp_path / "merged"), dtype="auto").state_dict()
    loaded = attach_delta(plain(base, dtype="auto"), base, delta).state_dict()
    for key, tensor in trained.items():
        assert torch.equal(merged[key], tensor), key
        assert torch.equal(loaded[key], tensor), key
    assert sum(not torch.equal(before[key], tensor) for key, tensor in trained.items()) >= 2

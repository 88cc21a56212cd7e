"""What trains beside the selection: exactly the parts asked for, in the model and in its delta."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from esft.changes import check_changes, trained_changes
from esft.delta import attach_delta, read_delta, write_delta
from esft.errors import DeltaError, ModelError, SelectionError
from esft.experts import attach, attached_parts, detach, part_buffers
from esft.exporting import export
from esft.fingerprint import fingerprint
from esft.merging import merge, verify
from esft.moe import inspect, trainable_parameters
from esft.official import import_official
from esft.selection import Selection
from esft.shards import open_checkpoint
from esft.switching import load_delta
from esft.trained_parts import PARTS, TrainedParts
from esft.unmerging import unmerge
from tests.deltas import load, save_base
from tests.families import small
from tests.models import EXPERTS, tiny
from tests.notes import Notes
from tests.training_loop import batches, train_steps

PICKED = {1: [5, 0], 2: [3]}
# Which tensors of a checkpoint are of which part: all names of three families, by hand.
KINDS = {
    "deepseek_v2": {
        r"model\.layers\.[12]\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight": "experts",
        r"model\.layers\.[12]\.mlp\.shared_experts\.(gate|up|down)_proj\.weight": "shared_experts",
        r"model\.layers\.[12]\.mlp\.gate\.weight": "router",
        r"model\.layers\.0\.mlp\.(gate|up|down)_proj\.weight": "non_expert_modules",
        r"model\.layers\.\d\.self_attn\..*": "non_expert_modules",
        r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight": "non_expert_modules",
        r"(model\.embed_tokens|model\.norm|lm_head)\.weight": "non_expert_modules",
    },
    "qwen3_moe": {
        r"model\.layers\.\d\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight": "experts",
        r"model\.layers\.\d\.mlp\.gate\.weight": "router",
        r"model\.layers\.\d\.self_attn\.([qkvo]_proj|[qk]_norm)\.weight": "non_expert_modules",
        r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight": "non_expert_modules",
        r"(model\.embed_tokens|model\.norm|lm_head)\.weight": "non_expert_modules",
    },
    "mixtral": {
        r"model\.layers\.\d\.block_sparse_moe\.experts\.\d\.w[123]\.weight": "experts",
        r"model\.layers\.\d\.block_sparse_moe\.gate\.weight": "router",
        r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight": "non_expert_modules",
        r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight": "non_expert_modules",
        r"(model\.embed_tokens|model\.norm|lm_head)\.weight": "non_expert_modules",
    },
}
COMBINATIONS = list(itertools.product([False, True], repeat=len(PARTS)))
ALL = dict.fromkeys(PARTS, True)


def kind_of(family: str, name: str) -> str:
    (kind,) = [kind for pattern, kind in KINDS[family].items() if re.fullmatch(pattern, name)]
    return kind


def is_picked(name: str) -> bool:
    place = re.search(r"layers\.(\d+)\..*experts\.(\d+)\.", name)
    return place is not None and int(place[2]) in PICKED.get(int(place[1]), [])


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def changed(base: Path, merged: Path) -> set[str]:
    """Compare two checkpoints byte for byte."""
    before, after = stored(base), stored(merged)
    assert before.keys() == after.keys()
    return {
        name
        for name, tensor in after.items()
        if not torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    }


def train_delta(base: Path, folder: Path, picked: Any = PICKED, **parts: bool | None) -> Any:
    """Train a few steps, write the delta, and return the trained model in the base's dtype."""
    model = attach(load(base), picked and Selection(experts=picked), **parts)
    train_steps(model, 3)
    found = fingerprint(open_checkpoint(base))
    changes = trained_changes(model, found)
    check_changes(changes, found)
    folder.mkdir(parents=True)
    write_delta(folder, found, changes, {"method": "esft", "base": {"name": "tiny"}})
    return detach(model).eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In bf16: what trains has fp32 masters."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, family) for family in KINDS}


@pytest.mark.parametrize("on", COMBINATIONS, ids=lambda on: "".join("01"[flag] for flag in on))
@pytest.mark.parametrize("family", KINDS)
def test_exactly_what_is_asked_for_changes(
    family: str, on: tuple[bool, ...], bases: dict[str, Path], tmp_path: Path
) -> None:
    parts = dict(zip(PARTS, on, strict=True))
    trained = train_delta(bases[family], tmp_path / "delta", **parts)
    merged = merge(bases[family], tmp_path / "delta", tmp_path / "merged")
    wanted = {
        name
        for name in stored(bases[family])
        if is_picked(name) or parts.get(kind_of(family, name), False)
    }
    assert changed(bases[family], merged) == wanted
    assert read_delta(tmp_path / "delta").entries.keys() == wanted
    for name, tensor in load(merged).state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


@pytest.mark.parametrize("on", COMBINATIONS[1:], ids=lambda on: "".join("01"[flag] for flag in on))
def test_parts_alone(on: tuple[bool, ...], bases: dict[str, Path], tmp_path: Path) -> None:
    base, parts = bases["deepseek_v2"], dict(zip(PARTS, on, strict=True))
    train_delta(base, tmp_path / "delta", None, **parts)
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    wanted = {n for n in stored(base) if parts.get(kind_of("deepseek_v2", n), False)}
    assert changed(base, merged) == wanted


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_all_experts(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    layers = [layer.index for layer in inspect(base).layers]
    everyone = {layer: list(range(EXPERTS)) for layer in layers}
    trained = train_delta(base, tmp_path / "delta", everyone)
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert changed(base, merged) == {name for name in stored(base) if ".experts." in name}
    for name, tensor in load(merged).state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_and_optimizer_state_exist_for_what_trains_only(
    part: str, dtype: torch.dtype
) -> None:
    model = attach(tiny("deepseek_v2").to(dtype), None, **{part: True})
    ids = batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable_parameters(model))
    assert {kind_of("deepseek_v2", name) for name in with_gradient} == {part}
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}
    assert all(p.grad.norm() > 0 for p in trainable_parameters(model).values())


def test_an_official_configuration_s_flags_are_followed() -> None:
    """There the routers are among the modules that are no experts."""
    experts = {1: [0]}
    shared = Selection(experts=experts, shared_experts=True)
    others = Selection(experts=experts, non_expert_modules=True)
    assert TrainedParts.of(shared) == TrainedParts(shared_experts=True)
    assert TrainedParts.of(others) == TrainedParts(non_expert_modules=True, router=True)
    assert TrainedParts.of(others, router=False) == TrainedParts(non_expert_modules=True)
    assert TrainedParts.of(others, non_expert_modules=False) == TrainedParts()
    assert TrainedParts.of(shared, shared_experts=False, router=True) == TrainedParts(router=True)
    assert TrainedParts.of(Selection(experts=experts), non_expert_modules=True) == TrainedParts(
        non_expert_modules=True
    )
    model = attach(tiny("deepseek_v2"), others)
    assert attached_parts(model).names == ("non_expert_modules", "router")
    trained = {kind_of("deepseek_v2", n) for n in trainable_parameters(model) if ".esft." not in n}
    assert trained == {"non_expert_modules", "router"}


def test_a_part_that_the_model_lacks_is_told_and_alone_refused() -> None:
    notes = Notes()
    attach(tiny("mixtral"), Selection(experts={1: [0]}, shared_experts=True), reporter=notes)
    assert notes.notes == ["shared_experts: this model has none; nothing of them trains"]
    model = tiny("mixtral")
    with pytest.raises(SelectionError, match=r"nothing would train: .*\(shared_experts\)"):
        attach(model, None, shared_experts=True)
    with pytest.raises(SelectionError, match=r"nothing would train: .*\(none\)"):
        attach(model, None)
    assert all(parameter.requires_grad for parameter in model.parameters())  # left as it was


def test_quantised_weights_are_refused_by_name() -> None:
    model = tiny("mixtral")
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight: torch\.int8; quantised"):
        attach(model, None, non_expert_modules=True)
    attach(model, None, router=True)


# Where the correction of the choice is: a buffer of the router, one of the block beside it, a
# parameter of the block, and one of a module in the router.
CORRECTIONS = {
    "deepseek_v3": "model.layers.2.mlp.gate.e_score_correction_bias",
    "minimax_m2": "model.layers.2.mlp.e_score_correction_bias",
    "lfm2_moe": "model.layers.2.feed_forward.expert_bias",
    "afmoe": "model.layers.2.mlp.expert_bias",
    "ernie4_5_moe": "model.layers.2.mlp.gate.moe_statics.e_score_correction_bias",
}


@pytest.mark.parametrize("family", CORRECTIONS)
def test_what_corrects_the_choice_is_the_router_s(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    small(family).save_pretrained(base)
    found = fingerprint(open_checkpoint(base))
    (name,) = [name for name in found if "expert_bias" in name or "correction" in name][-1:]
    for router in (False, True):
        model = attach(load(base), None, router=router, non_expert_modules=True)
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():  # as the bias update of arXiv 2408.15664 does
            state[CORRECTIONS[family]] += 0.5
        changes = {change.name: change.value for change in trained_changes(model, found)}
        assert (name in changes) == router
    before = stored(base)[name]
    assert torch.equal(changes[name].to(before.dtype), before + 0.5)


def test_of_a_router_s_buffers_those_train_that_are_stored_numbers() -> None:
    """Not a table of ids (DeepSeek-V4 routes by one), nor what is made at loading."""
    model = small("deepseek_v3")
    gate = model.model.layers[2].mlp.gate
    gate.register_buffer("tid2eid", torch.zeros(64, 2, dtype=torch.int64))
    gate.register_buffer("made", torch.zeros(EXPERTS), persistent=False)
    assert part_buffers(model) == {}
    attach(model, None, router=True)
    assert list(part_buffers(model)) == [
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)
    ]


def test_gates_of_shared_experts_are_theirs() -> None:
    model = attach(small("qwen2_moe"), None, shared_experts=True)
    trained = {re.sub(r"\.\d\.", ".N.", name) for name in trainable_parameters(model)}
    block = "model.layers.N.mlp.shared_expert"
    projections = {f"{block}.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert trained == {f"{block}_gate.weight", *projections}


def test_tied_embeddings_are_stored_once_as_in_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny("qwen3_moe", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(base)
    trained = train_delta(base, tmp_path / "delta", None, non_expert_modules=True)
    names = read_delta(tmp_path / "delta").entries.keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    merged = load(merge(base, tmp_path / "delta", tmp_path / "merged"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, trained.lm_head.weight)


def test_a_tensor_that_the_base_lacks_is_refused_before_training(tmp_path: Path) -> None:
    """The base ties its embeddings, the model that is trained does not."""
    base = tmp_path / "base"
    tiny("qwen3_moe", tie_word_embeddings=True).save_pretrained(base)
    found = fingerprint(open_checkpoint(base))
    model = attach(tiny("qwen3_moe"), None, non_expert_modules=True)
    with pytest.raises(DeltaError, match=r"lm_head\.weight was trained but is not in the base"):
        check_changes(trained_changes(model, found), found)


@pytest.fixture(scope="module")
def whole(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of everything in DeepSeek-V2 but the experts that are not selected."""
    folder = tmp_path_factory.mktemp("whole") / "delta"
    train_delta(bases["deepseek_v2"], folder, **ALL)
    return folder


def test_every_way_of_using_a_delta_takes_one_with_parts(
    whole: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["deepseek_v2"]
    merged = merge(base, whole, tmp_path / "merged")
    assert verify(base, whole, merged).merged is not None
    attached = attach_delta(load(base), base, whole)
    for name, tensor in load(merged).state_dict().items():
        assert torch.equal(attached.state_dict()[name], tensor), name
    export(whole, tmp_path / "coded", base=base, compress=True)
    assert not changed(merged, merge(base, tmp_path / "coded", tmp_path / "merged again"))
    assert not changed(base, unmerge(merged, tmp_path / "coded", tmp_path / "plain"))
    assert not changed(base, unmerge(merged, whole, tmp_path / "put back", base=base))


def test_switching_refuses_a_delta_with_parts_and_says_why(
    whole: Path, bases: dict[str, Path]
) -> None:
    model = load(bases["deepseek_v2"])
    with pytest.raises(DeltaError, match=r"lm_head\.weight is not a routed expert's: .*; merge"):
        load_delta(model, whole, base=bases["deepseek_v2"])


def official(base: Path, delta: Path, out: Path) -> dict[str, Any]:
    """Export as an official adapter, import that again, and return its configuration."""
    export(delta, out, official=True)
    again = import_official(out, base, out.with_name("again"))
    assert {n: t.tolist() for n, t in stored(again.folder).items()} == {
        n: t.tolist() for n, t in stored(delta).items()
    }
    return json.loads((out / "expert_cfg.json").read_text())


def test_the_official_format_holds_shared_experts_and_everything(
    whole: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["deepseek_v2"]
    config = official(base, whole, tmp_path / "whole" / "adapter")
    assert (config["shared_experts"], config["non_expert_modules"]) == (True, True)
    train_delta(base, tmp_path / "shared" / "delta", shared_experts=True)
    config = official(base, tmp_path / "shared" / "delta", tmp_path / "shared" / "adapter")
    assert (config["shared_experts"], config["non_expert_modules"]) == (True, False)
    assert config["experts"] == {"1": [0, 5], "2": [3]}


def test_gates_of_shared_experts_are_theirs_in_the_official_format_too(tmp_path: Path) -> None:
    small("qwen2_moe").save_pretrained(tmp_path / "base")
    model = attach(load(tmp_path / "base"), Selection(experts={1: [0]}), shared_experts=True)
    found = fingerprint(open_checkpoint(tmp_path / "base"))
    (tmp_path / "delta").mkdir()
    write_delta(tmp_path / "delta", found, trained_changes(model, found), {"method": "esft"})
    config = official(tmp_path / "base", tmp_path / "delta", tmp_path / "out" / "adapter")
    assert (config["shared_experts"], config["non_expert_modules"]) == (True, False)


@pytest.mark.parametrize("part", ["non_expert_modules", "router"])
def test_the_official_format_has_no_router_apart(
    part: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    train_delta(bases["deepseek_v2"], tmp_path / "delta", **{part: True})
    with pytest.raises(DeltaError, match=r"non_expert_modules are all .* of the routers too"):
        export(tmp_path / "delta", tmp_path / "adapter", official=True)
    assert not (tmp_path / "adapter").exists()


def test_inspect_counts_what_each_part_would_train() -> None:
    for family in KINDS:
        model = tiny(family)
        found = inspect(model)
        assert found.routed + sum(found.parts.values()) == found.total
        for part in PARTS:
            if found.parts[part]:
                attached = attach(tiny(family), None, **{part: True})
                trained = sum(p.numel() for p in trainable_parameters(attached).values())
                assert found.parts[part] == trained


def test_detaching_leaves_an_ordinary_model() -> None:
    model = attach(tiny("deepseek_v2").to(torch.bfloat16), Selection(experts=PICKED), **ALL)
    detach(model)
    plain = AutoModelForCausalLM.from_config(model.config)
    assert [type(module) for module in model.modules()] == [type(m) for m in plain.modules()]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert attached_parts(model) == TrainedParts()

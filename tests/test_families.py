"""Every family of transformers with routed experts, through the whole chain: one case a family.

A tiny random model is built, profiled, trained for three steps on what the profile selects, written
as a delta, merged and loaded by plain transformers. The oracles are a loop over what the experts
were called with, and comparison bit by bit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from esft.changes import expert_changes, trained_changes
from esft.data.example import Example
from esft.data.isolation import check_isolation
from esft.delta import attach_delta, write_delta
from esft.errors import ModelError
from esft.experts import attach, detach
from esft.fingerprint import Fingerprint, fingerprint
from esft.loading import auto_class, load_model
from esft.merging import merge
from esft.moe import inspect, moe_layers, trainable_parameters
from esft.names import layer_parts, to_disk
from esft.pairs import Pair, profile_pairs
from esft.profiling import profile_model
from esft.scores import LayerScores, Scores
from esft.selection import select
from esft.shards import open_checkpoint
from esft.trained_parts import PARTS, ROUTER, SHARED_EXPERTS, parameter_parts, router_buffers
from tests.expert_calls import Calls, watched
from tests.families import SIZES
from tests.family_table import FAMILIES, Family
from tests.models import EXPERTS
from tests.router_passes import check_bias, check_passes
from tests.training_loop import batches, train_steps
from tools.families_page import PAGE, render

COVERED = [name for name, family in FAMILIES.items() if family.refused is None]
REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]


def config_of(name: str) -> Any:
    if name not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    family = FAMILIES[name]
    if family.since and Version(transformers.__version__) < Version(family.since):
        pytest.skip(f"{name} needs transformers {family.since}, see docs/families.md")
    fields = SIZES | dict(family.fields)
    if family.parts:
        return AutoConfig.for_model(name, text_config=fields, **family.parts)
    return AutoConfig.for_model(name, **fields)


def model_of(name: str) -> PreTrainedModel:
    """Return a random model in bfloat16, but for what its family keeps in float32."""
    config = config_of(name)
    model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
    exact = tuple(model._keep_in_fp32_modules_strict or ())
    generator = torch.Generator().manual_seed(0)
    for path, parameter in model.named_parameters():
        dtype = torch.float32 if any(part in path for part in exact) else torch.bfloat16
        mean = 1.0 if parameter.dim() == 1 and not path.endswith("bias") else 0.0
        parameter.data = (mean + torch.randn(parameter.shape, generator=generator) * 0.2).to(dtype)
    for path, buffer in model.named_buffers():
        if path.endswith(".tid2eid"):  # DeepSeek-V4: which experts a token id goes to
            shuffled = torch.rand(len(buffer), EXPERTS, generator=generator).argsort()
            buffer.copy_(shuffled[:, : buffer.shape[1]])
    return model  # type: ignore[no-any-return]


def cloned(model: Any) -> Any:
    for parameter in model.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    return model.eval()


def rows() -> list[Example]:
    tokens = torch.randint(3, 64, (62,), generator=torch.Generator().manual_seed(1))
    pieces = tokens.split([5, 21, 34, 2])
    return [Example(piece.tolist(), [True] * len(piece), "rows") for piece in pieces]


def profile(model: Any) -> tuple[Scores, Calls, list[Tensor]]:
    """Profile a model; return its scores, its experts' calls, and which tokens of each are real."""
    examples = rows()
    with watched(model) as (calls, real):
        if not model.config.is_encoder_decoder:
            return profile_model(model, examples), calls, real
        pair = Pair(examples[2].input_ids, examples[2].input_ids)
        return profile_pairs(model, [pair]), calls, [torch.ones(34, dtype=torch.bool)]


def check_scores(
    family: Family, layer: LayerScores, calls: list[tuple[Tensor, Tensor]], real: list[Tensor]
) -> None:
    """Compare a layer's scores with a loop over every choice."""
    counts, gates, tokens, K = [0] * EXPERTS, [0.0] * EXPERTS, 0, family.top_k
    for (index, weight), mask in zip(calls, real, strict=True):
        chosen = index.reshape(-1, K)[mask].tolist()
        weights = weight.reshape(-1, K)[mask].double().tolist()
        tokens += len(chosen)
        for ids, values in zip(chosen, weights, strict=True):
            for expert, value in zip(ids, values, strict=True):
                # Ids from E on are no experts; ZAYA writes weight 0 where it chose none.
                if expert < EXPERTS and value != 0:
                    counts[expert] += 1
                    gates[expert] += value / family.scale
    assert (layer.experts, layer.top_k, layer.tokens) == (EXPERTS, K, tokens)
    assert layer.token == pytest.approx([n / K / tokens for n in counts], abs=1e-12)
    assert layer.gate == pytest.approx([gate / tokens for gate in gates], abs=1e-12)
    assert sum(n > 0 for n in counts) > 1
    if family.mass is not None:
        assert sum(layer.gate) == pytest.approx(family.mass, abs=5e-3)  # of weights in bfloat16


def check_moved(
    before: dict[str, Tensor], after: dict[str, Tensor], picked: dict[str, list[int]]
) -> None:
    """Check that the picked experts changed in all of their tensors, and nothing else did.

    Args:
        before: of the model's own state dict.
        after: likewise.
        picked: experts by the path of the module that holds them.
    """
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        different = tensor != before[name]
        experts = next((e for path, e in picked.items() if name.startswith(f"{path}.")), None)
        if experts is None or ".router." in name or tensor.dim() < 2:
            assert not different.any(), name
        elif match := re.search(r"\.expert_(\d+)\.", name):  # a module each
            assert different.any() == (int(match[1]) in experts), name
        else:
            if ".ffn.experts.mlp." in name:  # DBRX: [E * F, D]
                different = different.unflatten(0, (EXPERTS, -1))
            changed = different.flatten(1).any(1).nonzero().flatten().tolist()
            assert changed == sorted(experts), name


# Buffers that no training changes, though checkpoints store them.
CONSTANTS = r"\.(layer_scalar|tid2eid|(query|key|diagonal)_decay|slope_rate)$|^lerope\.alpha$"


def check_parts(family: Family, model: Any, base: Fingerprint) -> None:
    """Check that each tensor of the base is an expert's, of exactly one part, or a constant."""
    layers = moe_layers(model)
    state = model.state_dict()
    experts = {
        name
        for layer in layers
        for pieces in layer_parts(model, layer, base).values()
        for piece in pieces
        for name in piece.names
    }
    by_part: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, part in parameter_parts(model, layers).items():
        by_part[part][name] = state[name]
    assert bool(by_part[SHARED_EXPERTS]) == family.shared
    by_part[ROUTER] |= router_buffers(model, layers)
    for layer in layers:
        block = layer.name.rpartition(".")[0]
        assert any(name.startswith(block) for name in by_part[ROUTER])
    on_disk = [set(to_disk(model, tensors)) for tensors in by_part.values()] + [experts]
    assert sum(map(len, on_disk)) == len(set().union(*on_disk))
    left = base.keys() - set().union(*on_disk)
    assert all(re.search(CONSTANTS, name) for name in left), left


def logits(model: Any) -> Tensor:
    ids = batches(1)[0]
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **both).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", COVERED)
def test_the_whole_chain(name: str, tmp_path: Path) -> None:
    family, model = FAMILIES[name], model_of(name)
    base, delta = tmp_path / "base", tmp_path / "delta"
    model.save_pretrained(base)
    found = inspect(base)
    assert [bool(layer.shared) for layer in found.layers] == [family.shared] * len(found.layers)

    scores, calls, real = profile(model)
    assert set(scores.layers) == {layer.index for layer in found.layers}
    at = dict(zip(sorted(calls, key=list(calls).index), sorted(scores.layers), strict=True))
    for path, index in at.items():
        assert f".{index}." in path or model.config.is_encoder_decoder
        check_scores(family, scores.layers[index], calls[path], real)
    selection = select(scores, p=0.25)

    plain = type(model).from_pretrained
    if model.config.is_encoder_decoder:
        trained = cloned(plain(base, dtype="auto"))
    else:
        trained = cloned(load_model(base, dtype="checkpoint"))
        if family.packs:
            check_isolation(trained)
        else:
            with pytest.raises(ModelError, match=r"set data\.packing: false"):
                check_isolation(trained)
    before = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in before.items())
    fingerprints = fingerprint(open_checkpoint(base))
    check_parts(family, trained, fingerprints)
    attach(trained, selection).train()
    train_steps(trained, 3)
    delta.mkdir()
    changes = expert_changes(trained, fingerprints)
    assert {change.rows is not None for change in changes} == {family.disk == "fused"}
    write_delta(delta, fingerprints, changes, {"method": "esft", "base": {}})
    after = detach(trained).eval().state_dict()
    check_moved(before, after, {path: selection.experts.get(at[path], []) for path in at})

    merged = cloned(plain(merge(base, delta, tmp_path / "merged"), dtype="auto"))
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, after[key]), key
    expected = logits(trained)
    assert expected.isfinite().all()
    assert torch.equal(logits(merged), expected)

    model.requires_grad_(True)
    passes = check_passes(model, family.scoring)
    check_bias(model, passes, family.biased, name)


# Where a checkpoint cuts, joins, turns or keeps in another dtype what is no routed expert's, or a
# router moves itself to another dtype.
OTHERWISE = (
    "bailing_hybrid",
    "hunyuan_v1_moe",
    "minimax_m3_vl",
    "mistral_large4",
    "step3p7",
    "switch_transformers",
)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_trains_beside_the_selection(name: str, tmp_path: Path) -> None:
    base, delta = tmp_path / "base", tmp_path / "delta"
    kind = type(model_of(name))
    model_of(name).save_pretrained(base)
    model = cloned(kind.from_pretrained(base, dtype="auto"))
    fingerprints = fingerprint(open_checkpoint(base))
    attach(model, None, shared_experts=True, non_expert_modules=True, router=True)
    logits(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            moved = parameter + torch.randn(parameter.shape, generator=generator)
            # Numbers that bf16 has: some are stored in it, though in memory they are in float32.
            parameter.copy_(moved.to(torch.bfloat16))
    delta.mkdir()
    changes = trained_changes(model, fingerprints)
    write_delta(delta, fingerprints, changes, {"method": "esft", "base": {}})
    merged = kind.from_pretrained(merge(base, delta, tmp_path / "merged"), dtype="auto")
    loaded = attach_delta(kind.from_pretrained(base, dtype="auto"), base, delta)
    expected, found = detach(model).state_dict(), loaded.state_dict()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_covered_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        inspect(tmp_path)
    kind = config.get_text_config().model_type
    assert str(caught.value).startswith(f"{kind}: esft cannot train this family: ")
    assert str(FAMILIES[name].refused) in str(caught.value)


def families_of_transformers() -> set[str]:
    """Return the model types whose code has experts, or whose configuration counts them."""
    folder = Path(transformers.__file__).parent / "models"
    code = re.compile(r"^@use_experts_implementation|^class \w+Experts\(", re.MULTILINE)
    count = re.compile(r"^    (num|n|moe_num)_(local_|routed_)?experts\b", re.MULTILINE)
    found = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ):
        for name in mapping:
            sources = {
                kind: "".join(
                    file.read_text()
                    for file in (folder / model_type_to_module_name(name)).glob(kind)
                )
                for kind in ("modeling_*.py", "configuration_*.py")
            }
            if code.search(sources["modeling_*.py"]) or count.search(sources["configuration_*.py"]):
                found.add(name)
    return found


def test_no_family_of_transformers_is_missing_here() -> None:
    found = families_of_transformers()
    assert len(found) > 50
    assert not found - FAMILIES.keys(), "new families with routed experts: add them to the table"


def test_the_page_is_the_table() -> None:
    text = PAGE.read_text()
    if f"transformers {transformers.__version__}" not in text:
        pytest.skip(f"{PAGE.name} is of another version than {transformers.__version__}")
    assert text == render(transformers.__version__), "run tools/families_page.py"

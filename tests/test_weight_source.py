"""`esft.weight_source`, against `from_pretrained`."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import ModelError
from esft.loading import auto_class, load_config
from esft.moe import moe_layers
from esft.weight_source import WeightSource
from tests.checkpoints import save_tiny
from tests.models import tiny
from tests.models_of_ours.tiny_models import NAMES as OURS
from tests.models_of_ours.tiny_models import tiny as tiny_of_ours
from tests.test_families import COVERED, model_of


def saved(folder, family):
    model = tiny_of_ours(family) if family in OURS else model_of(family)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def plain(folder, dtype="auto"):
    config = load_config(folder)
    return auto_class(config).from_pretrained(folder, dtype=dtype).eval()


def check_same(found, expected):
    """Compare all tensors bit by bit, also buffers that no checkpoint stores."""
    for kind in ("named_parameters", "named_buffers"):
        mine = dict(getattr(found, kind)(remove_duplicate=False))
        wanted = dict(getattr(expected, kind)(remove_duplicate=False))
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("family", [*COVERED, *OURS])
def test_every_tensor_is_what_from_pretrained_gives(tmp_path, family):
    folder = saved(tmp_path, family)
    source = WeightSource.open(folder)
    assert all(p.device.type == "meta" for p in source.model.parameters())
    source.fill(source.names)
    check_same(source.model, plain(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoehybrid", "minimax_m2"])
def test_another_dtype_is_taken_as_from_pretrained_takes_it(tmp_path, family, dtype):
    folder = saved(tmp_path, family)
    source = WeightSource.open(folder, dtype)
    source.fill(source.names)
    expected = plain(folder, dtype)
    check_same(source.model, expected)
    for parameter in expected.parameters():  # views of the file, which can differ in the last bit
        parameter.data = parameter.data.clone()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("family", [*COVERED, *OURS])
def test_an_expert_by_itself_is_its_slice(tmp_path, family):
    folder = saved(tmp_path, family)
    source = WeightSource.open(folder)
    for layer, expected in zip(source.layers, moe_layers(plain(folder)), strict=True):
        weights = expected.layout.weights()
        for expert in (0, layer.num_experts - 1):
            found = source.read_expert(layer, expert)
            assert found.keys() == weights.keys()
            for weight, value in found.items():
                assert value.dtype == weights[weight][expert].dtype
                assert torch.equal(value, weights[weight][expert])


def test_what_is_emptied_is_gone_and_can_be_put_again(tmp_path):
    source = WeightSource.open(save_tiny(tmp_path))
    names = source.under("model.layers.1")
    assert len(names) == len(dict(source.model.model.layers[1].named_parameters()))
    assert all(name.startswith("model.layers.1.") for name in names)
    tensors = source.read(names)
    source.put(tensors)
    layer = source.model.get_submodule("model.layers.1")
    others = source.model.get_submodule("model.layers.2")
    assert all(p.device.type == "cpu" for p in layer.parameters())
    assert all(p.device.type == "meta" for p in others.parameters())
    source.empty(names)
    assert all(p.device.type == "meta" for p in layer.parameters())
    source.put(tensors)
    for name, tensor in layer.named_parameters(prefix="model.layers.1"):
        assert torch.equal(tensor, tensors[name])


def test_what_ends_an_answer_is_read_as_well(tmp_path):
    folder = saved(tmp_path, "olmoe")
    settings = {"eos_token_id": [3, 4], "max_new_tokens": 5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    found = WeightSource.open(folder).model.generation_config
    assert found.to_dict() == plain(folder).generation_config.to_dict()
    assert found.eos_token_id == [3, 4]


def test_all_bytes_of_the_files_are_counted_once(tmp_path):
    source = WeightSource.open(saved(tmp_path, "deepseek_v3"))
    payload = sum(
        tensor.nbytes
        for file in tmp_path.glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    assert source.stored_bytes(source.names) == payload
    assert source.stored_bytes(source.names * 2) == payload
    parts = [source.under("model.layers.0"), source.under("model.layers.1")]
    assert source.stored_bytes(parts[0] + parts[1]) == sum(map(source.stored_bytes, parts))


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("stored", [EMBEDDINGS, HEAD, "both, the same", "both, different"])
def test_tied_weights_are_what_from_pretrained_makes_of_them(tmp_path, stored):
    model = tiny("qwen3_moe", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert HEAD not in tensors
    if stored != EMBEDDINGS:
        tensors[HEAD] = tensors[EMBEDDINGS].clone() + (1.0 if stored.endswith("different") else 0.0)
    if stored == HEAD:
        del tensors[EMBEDDINGS]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    source, expected = WeightSource.open(tmp_path), plain(tmp_path)
    source.fill(source.names)
    check_same(source.model, expected)
    one = source.model.get_parameter(HEAD) is source.model.get_parameter(EMBEDDINGS)
    assert one == (stored in (HEAD, EMBEDDINGS))
    assert set(source.read([HEAD])) == {stored if stored in (HEAD, EMBEDDINGS) else HEAD}
    source.empty([HEAD, EMBEDDINGS])
    assert source.model.get_parameter(HEAD).device.type == "meta"
    assert source.model.get_parameter(EMBEDDINGS).device.type == "meta"


def test_a_checkpoint_of_the_base_model_alone_has_no_head(tmp_path):
    tiny("qwen3_moe").model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors, among them lm_head"):
        WeightSource.open(tmp_path)


STACK = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("missing", [range(8), [3]])
def test_a_stack_that_lacks_a_tensor_is_named(tmp_path, missing):
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for expert in missing:
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{re.escape(STACK)}: .* missing"):
        WeightSource.open(tmp_path).read([STACK])


@pytest.mark.parametrize("key", ["experts.5.up_proj.weight", "gate.weight"])
def test_a_tensor_of_another_shape_is_named(tmp_path, key):
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.mlp.{key}"
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, file, {"format": "pt"})
    source = WeightSource.open(tmp_path)
    with pytest.raises(ModelError, match=re.escape(name)):
        source.read(source.under("model.layers.1"))


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_shard_that_is_damaged_after_opening_is_named(tmp_path, damage):
    saved(tmp_path, "qwen3_moe")
    source = WeightSource.open(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    key = source.places(source.layers[1])["gate_up_proj"][0].name(7)
    entry = source.checkpoint.entries[key]
    if damage == "gone":
        entry.file.unlink()
    else:
        os.truncate(entry.file, entry.end - 1)
    with pytest.raises(ModelError, match=re.escape(str(entry.file))):
        source.read([name])
    with pytest.raises(ModelError, match=re.escape(str(entry.file))):
        source.read_expert(source.layers[1], 7)


def test_a_name_that_the_model_lacks_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.9"):
        WeightSource.open(save_tiny(tmp_path)).read(["model.layers.9.x"])


def test_a_quantised_checkpoint_is_refused(tmp_path):
    folder = save_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantised"):
        WeightSource.open(folder)


def test_threads_read_the_same_as_one(tmp_path):
    source = WeightSource.open(saved(tmp_path, "deepseek_v3"))
    one = source.read(source.names)
    fresh = WeightSource.open(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        several = dict(pool.map(lambda name: (name, fresh.read([name])[name]), fresh.names))
    assert all(torch.equal(several[name], one[name]) for name in one)

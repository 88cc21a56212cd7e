"""Where experts lie on disk, against what plain `save_pretrained` writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from esft.errors import ModelError
from esft.moe import moe_layers
from esft.names import disk_tensors, parts, write_into
from tests.deltas import save_base
from tests.families import CONFIGS, small
from tests.models import EXPERTS, tiny

# Those that store all experts of a layer in one tensor.
FUSED = {
    "aria_text", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
}  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_every_expert_is_found_on_disk(tmp_path, family):
    """Each part of each expert, read from the file into an empty stack, gives the model's stack."""
    model = small(family)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    used = set()
    for layer in moe_layers(model):
        for name, parameter in layer.experts.named_parameters(recurse=False):
            stack = parameter.detach()
            rebuilt = torch.zeros_like(stack)
            for part in parts(model, f"{layer.name}.{name}", stack.shape):
                assert part.fused == (family in FUSED)
                for expert in range(EXPERTS):
                    whole = on_disk[part.name(expert)]
                    value = whole[expert] if part.fused else whole
                    assert part.numbers.shape == value.shape
                    part.write(rebuilt[expert], value)
                    assert torch.equal(part.read(stack[expert]), value)
                    used.add(part.name(expert))
            assert torch.equal(rebuilt, stack)
    experts = [layer.experts for layer in moe_layers(model)]
    stacked = sum(p.numel() for module in experts for p in module.parameters(recurse=False))
    assert sum(on_disk[name].numel() for name in used) == stacked


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h"])
def test_disk_tensors_are_what_save_pretrained_writes(tmp_path, family):
    model = small(family)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    found = dict(disk_tensors(model))
    assert found.keys() == on_disk.keys()
    for name, tensor in on_disk.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "granitemoe", "nemotron_h"])
def test_a_whole_checkpoint_written_into_a_model(tmp_path, family):
    source = small(family)
    source.save_pretrained(tmp_path)
    target = small(family)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    write_into(target, load_file(tmp_path / "model.safetensors"), {})
    for name, parameter in source.named_parameters():
        assert torch.equal(target.get_parameter(name), parameter), name


def test_rows_of_a_fused_tensor_go_to_their_experts():
    model = tiny("gpt_oss")
    name = "model.layers.1.mlp.experts.down_proj"
    before = model.get_parameter(name).detach().clone()
    rows = torch.randn(2, *before.shape[1:], generator=torch.Generator().manual_seed(0))
    write_into(model, {name: rows}, {name: [6, 2]})
    after = model.get_parameter(name).detach()
    assert torch.equal(after[6], rows[0])
    assert torch.equal(after[2], rows[1])
    others = [0, 1, 3, 4, 5, 7]
    assert torch.equal(after[others], before[others])


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(ModelError, match=r"tensor model\.layers\.9\.norm\.weight has no place"):
        write_into(tiny("olmoe"), {"model.layers.9.norm.weight": torch.ones(3)}, {})


def test_a_checkpoint_that_was_loaded_keeps_its_own_layout(tmp_path):
    """transformers writes back what it read: experts fused on disk stay so."""
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path, "qwen3_moe", save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    stack = "model.layers.0.mlp.experts.down_proj"
    (part,) = parts(model, stack, model.get_parameter(stack).shape)
    assert part.fused
    assert part.names[0] in load_file(base / "model.safetensors")

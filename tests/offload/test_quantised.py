"""Experts stored in few bits: what is computed is what the stored weights say."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import pytest
import torch
from esft_kernels.quantised import quantise

from esft.errors import EsftError, ModelError, OutputError
from esft.moe import moe_layers
from esft.offload.expert_memory import ExpertMemory
from esft.offload.stores import KINDS
from tests.models import tiny
from tests.offload.models import EXPERT, LEAST, answers, logits, offloaded, resident


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_each_expert_is_quantised_by_itself(
    tmp_path: Path, scratch: Path, family: str, bits: int
) -> None:
    tiny(family).save_pretrained(tmp_path)
    wanted = resident(tmp_path)
    exact = logits(wanted)
    for layer in moe_layers(wanted):
        for experts in layer.layout.weights().values():
            for weight in experts:
                if weight.dim() == 2:  # a bias is none
                    weight.copy_(quantise(weight, KINDS[bits]).dequantise(torch.float32))
    memory = ExpertMemory(LEAST * 2, bits=bits)
    with offloaded(tmp_path, memory) as model:
        found = logits(model)
        assert (found - logits(wanted)).norm() / found.norm() < 1e-5
        assert torch.equal(answers(model), answers(wanted))
        assert list(scratch.iterdir())
    assert not list(scratch.iterdir())
    assert (found - exact).norm() / exact.norm() > 1e-3  # it is not just the exact weights


def test_fewer_bits_hold_more_experts(tmp_path: Path, scratch: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    kept = {}
    for bits in (16, 4):
        memory = ExpertMemory(EXPERT * 10, bits=bits)
        with offloaded(tmp_path, memory) as model:
            answers(model, tokens=12)
        assert memory.figures.expert_bytes <= memory.budget
        kept[bits] = memory.figures.written.hit_rate
    assert kept[4] > 0.9 > kept[16]
    # A row of 24 or 32 numbers has one scale and one offset of 16 bits.
    rows, numbers = 2 * 24 + 32, 3 * 24 * 32
    assert memory.figures.store_bytes == 3 * 8 * (rows * 4 + numbers // 2)


def test_one_expert_that_is_computed_with_counts(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    with (
        pytest.raises(EsftError, match=rf"{EXPERT:,} bytes are too few.*for an expert that is"),
        offloaded(tmp_path, ExpertMemory(EXPERT, bits=2)),
    ):
        pass


def test_weights_that_are_not_finite_are_named(tmp_path: Path, scratch: Path) -> None:
    model = tiny("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 2, 1] = float("nan")
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts: expert 3 cannot be quantised"),
        offloaded(tmp_path, ExpertMemory("1GB", bits=4)),
    ):
        pass
    assert not list(scratch.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with (
            pytest.raises(OutputError, match=str(scratch)),
            offloaded(tmp_path, ExpertMemory("1GB", bits=4)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("bits", [1, 5, 32])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(EsftError, match=rf"--expert-bits {bits}: choose one of 16, 8, 4, 3, 2"):
        ExpertMemory("2GB", bits=bits)

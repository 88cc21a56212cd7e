"""With few experts at hand a model computes what it computes with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esft.errors import ModelError
from esft.offload.expert_memory import ExpertMemory
from tests.models import tiny
from tests.offload.models import EXPERT, IDS, LEAST, answers, logits, offloaded, resident
from tests.test_families import COVERED, model_of

# Matrix products and sums are the same, bit by bit. So is SiLU on rows that follow each other; an
# activation on strided halves (gpt-oss) or clamped ones may round otherwise at another place.
EXACT = ("deepseek_v2", "granitemoe", "mixtral", "nemotron_h", "olmoe", "qwen3_moe")
CLOSE = ("dbrx", "gpt_oss", "llama4_text", "longcat_flash")
REFUSED = ("jetmoe", "switch_transformers")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).norm() / wanted.norm() < 1e-5)


@pytest.mark.parametrize("family", EXACT + CLOSE)
def test_the_same_tokens_in_any_memory(tmp_path: Path, family: str) -> None:
    tiny(family).save_pretrained(tmp_path)
    plain = resident(tmp_path)
    one = IDS[:1, :1]
    wanted, wanted_one, written = logits(plain), logits(plain, one), answers(plain)
    for budget in (LEAST * 2, EXPERT * 9, EXPERT * 100):
        with offloaded(tmp_path, budget) as model:
            assert torch.equal(answers(model), written)
            for found, right in ((logits(model), wanted), (logits(model, one), wanted_one)):
                assert torch.equal(found, right) or family in CLOSE
                assert close(found, right)


@pytest.mark.parametrize("options", [{"ahead": 0}, {"ahead": 2}, {"keep": False}])
def test_the_same_tokens_whatever_is_guessed_and_kept(tmp_path: Path, options: dict) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    wanted = resident(tmp_path)
    with offloaded(tmp_path, ExpertMemory(EXPERT * 12, **options)) as model:
        assert torch.equal(logits(model), logits(wanted))
        assert torch.equal(answers(model), answers(wanted))


@pytest.mark.parametrize("dtype", ["bfloat16", "checkpoint"])
def test_in_half_precision(tmp_path: Path, dtype: str) -> None:
    tiny("deepseek_v2").to(torch.bfloat16).save_pretrained(tmp_path)
    wanted = resident(tmp_path, torch.bfloat16)
    memory = ExpertMemory(LEAST)  # twice as many as in fp32
    with offloaded(tmp_path, memory, dtype=dtype) as model:
        assert model.dtype == torch.bfloat16
        assert torch.equal(logits(model), logits(wanted))
    assert EXPERT < memory.figures.expert_bytes <= LEAST


@pytest.mark.parametrize("family", [name for name in COVERED if name not in REFUSED])
def test_every_family_that_trains(tmp_path: Path, family: str) -> None:
    model_of(family).save_pretrained(tmp_path)
    ids = IDS[:, :8]
    with offloaded(tmp_path, 100_000) as model:
        assert close(logits(model, ids), logits(resident(tmp_path), ids))


def test_a_family_that_takes_its_experts_otherwise_is_refused(tmp_path: Path) -> None:
    tiny("jetmoe").save_pretrained(tmp_path)
    with (
        pytest.raises(ModelError, match=r"layers\.0\.mlp: --expert-memory serves experts behind"),
        offloaded(tmp_path, "1GB"),
    ):
        pass


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    model_of("switch_transformers").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"), offloaded(tmp_path, "1GB"):
        pass


def test_shared_experts_and_all_else_are_in_memory(tmp_path: Path) -> None:
    tiny("deepseek_v2").save_pretrained(tmp_path)
    with offloaded(tmp_path, LEAST) as model:
        away = {name for name, p in model.named_parameters() if p.is_meta}
    assert away == {
        f"model.layers.{layer}.mlp.experts.{name}"
        for layer in (1, 2)
        for name in ("gate_up_proj", "down_proj")
    }

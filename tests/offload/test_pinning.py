"""A delta on a model with few experts at hand: what it is on a model with all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from esft_kernels.quantised import quantise
from safetensors.torch import save_file

from esft.changes import trained_changes, whole_changes
from esft.delta import attach_delta, write_delta
from esft.errors import CheckError, DeltaError, EsftError
from esft.experts import attach, detach
from esft.exporting import export
from esft.fingerprint import fingerprint
from esft.manifest import write_manifest
from esft.moe import moe_layers
from esft.names import disk_tensors
from esft.offload.expert_memory import ExpertMemory
from esft.offload.stores import KINDS
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.deltas import PICKED, WEIGHTS, load, save_base, train_delta
from tests.offload.models import EXPERT, LEAST, answers, logits, offloaded, resident
from tests.training_loop import train_steps

PINNED = 3 * EXPERT  # of `PICKED`


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def made(request: Any, tmp_path_factory: Any) -> tuple[str, Path, Path]:
    root = tmp_path_factory.mktemp(request.param)
    base = save_base(root / "base", request.param)
    train_delta(base, root / "delta")
    return request.param, base, root / "delta"


def with_delta(base: Path, delta: Path) -> Any:
    """Return the base with the delta written into its own weights: the oracle."""
    return attach_delta(resident(base), base, delta)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).norm() / wanted.norm() < 1e-5)


def test_a_delta_s_experts_are_in_the_place_of_the_base_s(made: tuple[str, Path, Path]) -> None:
    _, base, delta = made
    wanted = with_delta(base, delta)
    memory = ExpertMemory(PINNED + 3 * LEAST)
    with offloaded(base, memory, delta=delta) as model:
        assert close(logits(model), logits(wanted))
        assert not close(logits(model), logits(resident(base)))
        assert torch.equal(answers(model), answers(wanted))
    assert memory.figures.read.pinned > 0
    assert memory.figures.written.pinned > 0
    assert memory.figures.expert_bytes <= memory.budget


def test_pinned_experts_are_exact_where_the_others_are_quantised(
    made: tuple[str, Path, Path],
) -> None:
    _, base, delta = made
    wanted = with_delta(base, delta)
    for layer in moe_layers(wanted):
        for experts in layer.layout.weights().values():
            for expert, weight in enumerate(experts):
                if weight.dim() == 2 and expert not in PICKED.get(layer.index, []):
                    weight.copy_(quantise(weight, KINDS[3]).dequantise(torch.float32))
    with offloaded(base, ExpertMemory("1GB", bits=3), delta=delta) as model:
        assert close(logits(model), logits(wanted))


def test_what_else_a_delta_changes_is_changed(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "deepseek_v2")
    parts = dict.fromkeys(("shared_experts", "non_expert_modules", "router"), True)
    model = attach(load(base), Selection(experts=PICKED), **parts)
    train_steps(model, 2)
    prints = fingerprint(open_checkpoint(base))
    (tmp_path / "delta").mkdir()
    about = {"method": "esft", "base": {"name": "tiny"}}
    write_delta(tmp_path / "delta", prints, trained_changes(model, prints), about)
    detach(model)
    with offloaded(base, "1GB", delta=tmp_path / "delta") as found:
        wanted = with_delta(base, tmp_path / "delta")
        assert torch.equal(logits(found), logits(wanted))
        for name in ("mlp.shared_experts.up_proj", "self_attn.o_proj", "mlp.gate"):
            path = f"model.layers.1.{name}.weight"
            moved = model.get_parameter(path)
            assert torch.equal(found.get_parameter(path), moved.float())
            assert not torch.equal(resident(base).get_parameter(path), moved.float())


def test_a_delta_of_everything_pins_every_expert(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "olmoe")
    model = load(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    prints = fingerprint(open_checkpoint(base))
    (tmp_path / "delta").mkdir()
    changes = whole_changes(dict(disk_tensors(model)), prints)
    write_delta(tmp_path / "delta", prints, changes, {"method": "full", "base": {"name": "tiny"}})
    memory = ExpertMemory("1GB")
    with offloaded(base, memory, delta=tmp_path / "delta") as found:
        assert torch.equal(logits(found), logits(with_delta(base, tmp_path / "delta")))
    assert memory.figures.bytes_moved == 0
    assert memory.figures.read.needed == memory.figures.read.pinned


def test_a_compressed_delta(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, delta = made
    export(delta, tmp_path / "coded", base=base, compress=True)
    with offloaded(base, "1GB", delta=tmp_path / "coded") as model:
        assert close(logits(model), logits(with_delta(base, delta)))


def test_too_little_memory_beside_a_delta_names_its_part(made: tuple[str, Path, Path]) -> None:
    family, base, delta = made
    own = 3 * (EXPERT if family == "qwen3_moe" else EXPERT + 4 * (2 * 24 + 32))
    least = own * 5 // 3  # three pinned, two for a token
    with (
        pytest.raises(EsftError, match=rf"at least {least:,} .* for the delta's experts"),
        offloaded(base, least - 1, delta=delta),
    ):
        pass
    with offloaded(base, least, delta=delta) as model:
        assert close(logits(model), logits(with_delta(base, delta)))


def test_a_delta_of_another_base_is_refused(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, _, delta = made
    other = save_base(tmp_path / "other", family, seed=1)
    with pytest.raises(CheckError, match="another base"), offloaded(other, "1GB", delta=delta):
        pass


def test_a_damaged_delta_is_refused(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, delta = made
    copy = Path(shutil.copytree(delta, tmp_path / "delta"))
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(DeltaError, match="sha256"), offloaded(base, "1GB", delta=copy):
        pass


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    delta = tmp_path / "delta"
    delta.mkdir()
    save_file({"lora_A": torch.ones(2)}, delta / "adapter_model.safetensors")
    (delta / "adapter_config.json").write_text("{}")
    prints = fingerprint(open_checkpoint(base))
    write_manifest(delta, prints, {"method": "lora", "base": {"name": "tiny"}})
    with (
        pytest.raises(DeltaError, match=r"a LoRA adapter .* merge it into its base first"),
        offloaded(base, "1GB", delta=delta),
    ):
        pass

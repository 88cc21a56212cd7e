"""A delta written once more: the same values, in whatever form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esft.delta import attach_delta, read_delta
from esft.errors import CheckError, DeltaError, OutputError
from esft.exporting import export
from esft.merging import merge, verify
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, refusal
from tests.deltas import CONFIG, forge, load, save_base, train_delta

Made = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Bases and deltas: one tensor per expert, and all experts of a layer in one."""
    root = tmp_path_factory.mktemp("made")
    found = {}
    for family in ("qwen3_moe", "gpt_oss"):
        base = save_base(root / family / "base", family)
        train_delta(base, root / family / "delta")
        found[family] = base, root / family / "delta"
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("limit", [5 * 10**9, 3000])
def test_a_compressed_delta_is_the_delta(
    made: Made, family: str, limit: int, tmp_path: Path
) -> None:
    base, delta = made[family]
    coded = tmp_path / "coded"
    found = export(delta, coded, base=base, compress=True, shard_size=limit)
    assert (len(list(coded.glob("*.safetensors"))) > 1) == (limit == 3000)
    assert found.bytes == sum(tensor.nbytes for tensor in tensors(coded).values())
    assert found.parameters == sum(tensor.numel() for tensor in tensors(delta).values())
    assert found.plain_bytes == 2 * found.parameters
    merged = merge(base, delta, tmp_path / "merged")
    assert tensors_equal(tensors(merge(base, coded, tmp_path / "from coded")), tensors(merged))
    assert verify(base, coded, merged).merged == len(tensors(merged))
    states = [attach_delta(load(base), base, which).state_dict() for which in (delta, coded)]
    assert tensors_equal(*states)
    # And back: file for file what it was.
    export(coded, tmp_path / "again", base=base)
    assert content(tmp_path / "again") == content(delta)


def tensors_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_compression_pays(made: Made, tmp_path: Path) -> None:
    """Values a few units in the last place from the base's take a few bits, not sixteen."""
    base, delta = made["qwen3_moe"]
    stored = tensors(base)

    def nudged(changed: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        for name in changed:
            step = torch.randint(-2, 3, changed[name].shape, dtype=torch.int16)
            changed[name] = (stored[name].view(torch.int16) + step).view(torch.bfloat16)

    near = forge(delta, tmp_path / "near", fixed(nudged))
    found = export(near, tmp_path / "coded", base=base, compress=True)
    # Five values of equal chance: log2(5) = 2.3 bits.
    assert 2.3 < found.bits_per_parameter < 4.5


def fixed(change: Callable[..., None]) -> Callable[..., None]:
    """Make a random change the same each time: `forge` asks twice."""

    def seeded(*arguments: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            change(*arguments)

    return seeded


def test_a_compressed_delta_refuses_another_base(made: Made, tmp_path: Path) -> None:
    base, delta = made["qwen3_moe"]
    export(delta, tmp_path / "coded", base=base, compress=True)
    other = save_base(tmp_path / "other", seed=1)
    for call in (
        lambda: merge(other, tmp_path / "coded", tmp_path / "out"),
        lambda: export(tmp_path / "coded", tmp_path / "out", base=other),
        lambda: export(delta, tmp_path / "out", base=other, compress=True),
    ):
        with pytest.raises(CheckError, match=r"tensor model\.\S+ has other values"):
            call()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "other"]


def test_what_export_refuses(made: Made, tmp_path: Path) -> None:
    base, delta = made["qwen3_moe"]
    out = tmp_path / "out"
    with pytest.raises(DeltaError, match="--base: needed to code or decode"):
        export(delta, out, compress=True)
    export(delta, tmp_path / "coded", base=base, compress=True)
    with pytest.raises(DeltaError, match="--base: needed to code or decode"):
        export(tmp_path / "coded", out)
    with pytest.raises(DeltaError, match="the official format has no compression"):
        export(delta, out, base=base, compress=True, official=True)
    with pytest.raises(OutputError, match="not empty"):
        export(delta, delta)
    assert not out.exists()


def test_the_command(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "deepseek_v2")
    (tmp_path / "train.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n' * 4)
    options = ["--data", tmp_path / "train.jsonl", "--steps", "1", "--lr", "1e-5"]
    assert esft("train", base, *options, "--out", tmp_path / "run").returncode == 0
    delta, coded = tmp_path / "run" / "delta", tmp_path / "coded"
    said = json.loads((delta / CONFIG).read_text())
    assert said["format"] == "esft-delta/2"
    assert said["recipe"]["training"]["learning_rate"] == 1e-5
    assert said["scores"]["sample"]["tokens"] > 0
    assert said["selection"]["rule"]["p"] == 0.2
    assert said["versions"].keys() == {"esft", "python", "torch", "transformers", "safetensors"}
    assert len(said["base"]["tokenizer"]) == len(said["base"]["fingerprint"]) == 64
    found = esft_json("export", delta, "--out", coded, "--base", base, "--compress")
    assert found["out"] == str(coded)
    assert found["bits_per_parameter"] == 8 * found["bytes"] / found["parameters"]
    result = esft("export", coded, "--out", tmp_path / "again", "--base", base)
    assert f"{found['tensors']:,} tensors, {found['parameters']:,} parameters: " in result.stdout
    assert content(tmp_path / "again") == content(delta)
    assert "--base: needed" in refusal("export", coded, "--out", tmp_path / "x")
    assert "no esft_config.json" in refusal("export", base, "--out", tmp_path / "x")
    other = save_tiny(tmp_path / "other", "deepseek_v2", seed=1)
    refusal("export", coded, "--out", tmp_path / "x", "--base", other, code=3)
    lora = [*options, "--method", "lora", "--out", tmp_path / "lora"]
    assert esft("train", base, *lora).returncode == 0
    message = refusal("export", tmp_path / "lora" / "delta", "--out", tmp_path / "x")
    assert "a LoRA adapter is in PEFT's own files" in message
    assert read_delta(tmp_path / "again").method == "esft"

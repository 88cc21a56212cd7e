"""Deltas that lie: every hash is right, and yet they do not fit the base or hold no numbers."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esft.changes import Changed
from esft.delta import read_delta, write_delta
from esft.errors import DeltaError, OutputError
from esft.fingerprint import fingerprint
from esft.manifest import write_manifest
from esft.merging import merge
from esft.shards import open_checkpoint
from tests.deltas import CONFIG, PICKED, WEIGHTS, forge, save_base, train_delta

Tensors, Manifest = dict[str, Tensor], dict[str, Any]

NAME = "model.layers.1.mlp.experts.5.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Bases and deltas: one tensor per expert, and all experts of a layer in one."""
    root = tmp_path_factory.mktemp("deltas")
    found = {}
    for family in ("qwen3_moe", "gpt_oss"):
        base = save_base(root / family / "base", family)
        train_delta(base, root / family / "delta")
        found[family] = base, root / family / "delta"
    return found


def put(value: float):
    def change(tensors: Tensors, _: Manifest) -> None:
        tensors[NAME][3, 2] = value

    return change


def foreign(tensors: Tensors, _: Manifest) -> None:
    tensors["model.layers.1.mlp.experts.99.up_proj.weight"] = tensors[NAME].clone()


def cast(dtype: torch.dtype):
    def change(tensors: Tensors, _: Manifest) -> None:
        tensors[NAME] = tensors[NAME].to(dtype)

    return change


def turned(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = tensors[NAME].t().contiguous()


def cut(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def scalar(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = torch.zeros((), dtype=torch.bfloat16)


def rows_of_another(_: Tensors, manifest: Manifest) -> None:
    manifest["tensors"][NAME]["rows"] = [0]


def replaces_another(_: Tensors, manifest: Manifest) -> None:
    manifest["tensors"][NAME]["base_sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(float("nan")), f"tensor {NAME} has NaN or infinite values"),
        (put(float("inf")), f"tensor {NAME} has NaN or infinite values"),
        (put(float("-inf")), f"tensor {NAME} has NaN or infinite values"),
        (foreign, "tensor model.layers.1.mlp.experts.99.up_proj.weight: is not in the base"),
        (cast(torch.float32), f"tensor {NAME}: is F32 [24, 32], BF16 [24, 32] is expected"),
        (cast(torch.float16), f"tensor {NAME}: is F16 [24, 32], BF16 [24, 32] is expected"),
        (turned, f"tensor {NAME}: is BF16 [32, 24], BF16 [24, 32] is expected"),
        (cut, f"tensor {NAME}: is BF16 [23, 32], BF16 [24, 32] is expected"),
        (scalar, f"tensor {NAME}: is BF16 [], BF16 [24, 32] is expected"),
        (rows_of_another, f"tensor {NAME}: is BF16 [24, 32], BF16 [1, 32] is expected"),
        (replaces_another, f"tensor {NAME}: base_sha256 is not that of esft_base.json"),
    ],
)
def test_a_forged_delta_is_refused_by_the_tensor(made, tmp_path, change, message):
    base, delta = made["qwen3_moe"]
    forged = forge(delta, tmp_path / "forged", change)
    with pytest.raises(DeltaError) as caught:
        merge(base, forged, tmp_path / "merged")
    assert message in str(caught.value)
    assert str(forged) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["forged"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([8, 0], "rows out of range, or twice the same: [8, 0]"),
        ([-1, 0], "rows out of range, or twice the same: [-1, 0]"),
        ([2**63, 0], "rows out of range"),
        ([5, 5], "rows out of range, or twice the same: [5, 5]"),
        ([5.0, 0.0], "rows out of range"),
        (["5", "0"], "rows out of range"),
        ("50", "rows out of range"),
        ([[5], [0]], "rows out of range"),
        ([None, 0], "rows out of range"),
        ([True, False], "rows out of range"),
        ([5], "BF16 [1, 24, 32] is expected"),
        ([5, 0, 1], "BF16 [3, 24, 32] is expected"),
        ([], "BF16 [0, 24, 32] is expected"),
        (5, "rows out of range"),
        (None, "BF16 [8, 24, 32] is expected"),  # no rows: then it must hold all experts
    ],
)
def test_forged_rows_are_refused(made, tmp_path, rows, message):
    def change(_: Tensors, manifest: Manifest) -> None:
        del manifest["tensors"][FUSED]["rows"]
        if rows is not None:
            manifest["tensors"][FUSED]["rows"] = rows

    forged = forge(made["gpt_oss"][1], tmp_path / "forged", change)
    with pytest.raises(DeltaError) as caught:
        read_delta(forged)
    assert message in str(caught.value)
    assert f"esft_config.json: tensor {FUSED}: " in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(["format", "method", "base", "tensors", "files"], [None, 7, []]),
        ("coding", 7),
        ("coding", "zstd-difference/2"),
    ],
)
def test_a_manifest_with_a_key_of_another_kind_is_refused(made, tmp_path, key, value):
    folder = tmp_path / "delta"
    shutil.copytree(made["qwen3_moe"][1], folder)
    manifest = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(DeltaError, match=rf"esft_config\.json: .*{key}"):
        read_delta(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 3},
        {"shape": "x"},
        {"shape": [24, -32]},
        {"shape": [24.0, 32]},
        {"sha256": None},
        {"sha256": "0" * 63},
        {"sha256": "G" * 64},
        {"coded": 3},
        {"coded": {"bytes": -1, "sha256": "0" * 64}},
    ],
)
def test_a_tensor_described_wrongly_is_refused(made, tmp_path, change):
    def update(_: Tensors, manifest: Manifest) -> None:
        manifest["tensors"][NAME] |= change

    forged = forge(made["qwen3_moe"][1], tmp_path / "forged", update)
    with pytest.raises(DeltaError, match=rf"esft_config\.json: tensor {NAME}: .*(needs|agree)"):
        read_delta(forged)


def test_a_delta_as_forged_without_a_change_is_read(made, tmp_path):
    """Otherwise the tests above could fail for a reason of `forge`."""
    for _, delta in made.values():
        forged = read_delta(forge(delta, tmp_path / f"f{delta.parent.name}", lambda *_: None))
        assert forged.rows == read_delta(delta).rows
        assert forged.entries.keys() == read_delta(delta).entries.keys()
    per_expert = read_delta(made["qwen3_moe"][1])
    assert len(per_expert.entries) == 3 * sum(map(len, PICKED.values()))


def test_an_adapter_with_nan_is_refused(tmp_path):
    save_file({"lora_A": torch.tensor([1.0, float("nan")])}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    write_manifest(tmp_path, {}, {"method": "lora"})
    with pytest.raises(DeltaError, match="tensor lora_A has NaN or infinite values"):
        read_delta(tmp_path)


@pytest.mark.parametrize("limit", [1, 2000, 10_000])
def test_a_delta_in_shards_is_the_same_delta(made, tmp_path, limit):
    base, delta = made["qwen3_moe"]
    fingerprinted = fingerprint(open_checkpoint(base))
    changes = [Changed(name, tensor) for name, tensor in load_file(delta / WEIGHTS).items()]
    (tmp_path / "cut").mkdir()
    write_delta(tmp_path / "cut", fingerprinted, changes, {"method": "esft"}, shard_size=limit)
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    most = max(limit, 24 * 32 * 2)  # a tensor of its own may be larger than the limit
    assert all(path.stat().st_size <= most + 2000 for path in files)
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    assert max(sizes) <= most
    assert len(files) == {1: 9, 2000: 9, 10_000: 2}[limit]
    index = json.loads((tmp_path / "cut" / "esft_delta.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {change.name for change in changes}
    assert index["metadata"] == {"total_size": sum(sizes)}
    for folder in ("cut", "one"):
        merge(base, {"cut": tmp_path / "cut", "one": delta}[folder], tmp_path / f"m_{folder}")
    assert (tmp_path / "m_cut" / "model.safetensors").read_bytes() == (
        tmp_path / "m_one" / "model.safetensors"
    ).read_bytes()


BASE = {
    "w": {"dtype": "BF16", "shape": [4, 6], "sha256": "0" * 64},
    "half": {"dtype": "F16", "shape": [4, 6], "sha256": "0" * 64},
    "fused": {"dtype": "F32", "shape": [8, 4, 6], "sha256": "0" * 64},
    "fp8": {"dtype": "F8_E4M3", "shape": [4, 6], "sha256": "0" * 64},
    "packed": {"dtype": "U8", "shape": [4, 6], "sha256": "0" * 64},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Changed("gone", torch.zeros(4, 6)), "tensor gone was trained but is not in the base"),
        (Changed("w", torch.zeros(6, 4)), r"tensor w has shape \[6, 4\], \[4, 6\]"),
        (Changed("w", torch.zeros(24)), r"tensor w has shape \[24\], \[4, 6\]"),
        (Changed("w", torch.zeros(1, 4, 6)), r"tensor w has shape \[1, 4, 6\], \[4, 6\]"),
        (Changed("fused", torch.zeros(2, 4, 6)), r"tensor fused has shape \[2, 4, 6\], \[8, 4, 6"),
        (Changed("fused", torch.zeros(2, 4, 6), (1, 2, 3)), r"tensor fused has shape .*\[3, 4, 6"),
        (Changed("fp8", torch.zeros(4, 6)), "tensor fp8 is stored as F8_E4M3 .* quantised"),
        (Changed("packed", torch.zeros(4, 6)), "tensor packed is stored as U8 .* quantised"),
        # Finite in fp32, not in the base's dtype.
        (Changed("half", torch.full((4, 6), 1e5)), "tensor half has NaN or infinite values"),
    ],
)
def test_what_does_not_fit_the_base_is_not_written(tmp_path, change, message):
    good = Changed("w", torch.ones(4, 6))
    with pytest.raises(DeltaError, match=message):
        write_delta(tmp_path, BASE, [good, change], {"method": "esft"})
    assert list(tmp_path.iterdir()) == []


def test_written_values_are_those_of_the_base_s_dtype(tmp_path):
    values = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    changes = [Changed("w", values[0].double()), Changed("fused", values.bfloat16(), (7, 2))]
    write_delta(tmp_path, BASE, changes, {"method": "esft"})
    delta = read_delta(tmp_path)
    assert {name: (entry.dtype, entry.shape) for name, entry in delta.entries.items()} == {
        "w": ("BF16", (4, 6)),
        "fused": ("F32", (2, 4, 6)),
    }
    assert delta.rows == {"fused": (7, 2)}


def test_writing_into_a_folder_that_is_gone(tmp_path):
    change = Changed("w", torch.ones(4, 6))
    with pytest.raises(OutputError, match=r"esft_delta\.safetensors: cannot write"):
        write_delta(tmp_path / "gone", BASE, [change], {"method": "esft"})

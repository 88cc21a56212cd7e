"""S4 to S6: deltas whose hashes are right, and which are wrong all the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file
from torch import Tensor

from esft.delta import read_delta
from esft.errors import DeltaError, ModelError
from esft.exporting import export
from esft.fingerprint import fingerprint
from esft.manifest import write_manifest
from esft.merging import merge
from esft.shards import open_checkpoint
from tests.deltas import BASE, CONFIG, WEIGHTS, forge, raw
from tests.faults.material import FUSED, Material, copy, refusal

NAME = "model.layers.0.mlp.experts.2.up_proj.weight"
OTHER = "model.layers.1.mlp.experts.3.down_proj.weight"
UNPICKED = "model.layers.0.mlp.experts.1.up_proj.weight"
Tensors, Manifest = dict[str, Tensor], dict[str, Any]
Change = Callable[[Tensors, Manifest], None]


def put(value: float, name: str = NAME) -> Change:
    def change(tensors: Tensors, _: Manifest) -> None:
        tensors[name].view(-1)[5] = value

    return change


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_s4_a_value_that_is_no_number(value: str, material: Material, tmp_path: Path) -> None:
    delta = forge(material.plain, tmp_path / "delta", put(float(value)))
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.endswith(f"tensor {NAME} has NaN or infinite values")


def test_s4_nan_in_a_compressed_delta(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = forge(material.plain, tmp_path / "plain", put(float("nan"), FUSED))
    with monkeypatch.context() as forger:
        forger.setattr("esft.delta_weights.is_finite", lambda *_: True)
        export(delta, tmp_path / "delta", base=material.base, compress=True)
    message = refusal(material.base, tmp_path / "delta", tmp_path / "merged", DeltaError)
    assert message == f"{tmp_path / 'delta'}: tensor {FUSED} has NaN or infinite values"


def left_out(*names: str) -> Callable[[Path], None]:
    def spoil(delta: Path) -> None:
        tensors = load_file(delta / WEIGHTS)
        save_file({n: t for n, t in tensors.items() if n not in names}, delta / WEIGHTS)

    return spoil


def extra(delta: Path) -> None:
    tensors = load_file(delta / WEIGHTS)
    save_file(tensors | {UNPICKED: tensors[NAME].clone()}, delta / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (left_out(NAME), f"tensor {NAME}: in the manifest but not in the weights"),
        (left_out(NAME, OTHER), f"tensors {NAME}, {OTHER}: in the manifest but not in the weights"),
        (extra, f"tensor {UNPICKED}: in the weights but not in the manifest"),
    ],
    ids=["one left out", "two left out", "one more"],
)
def test_s5_tensors_left_out_or_added(
    spoil: Callable[[Path], None], message: str, material: Material, tmp_path: Path
) -> None:
    delta = copy(material.plain, tmp_path / "delta")
    spoil(delta)
    assert message in refusal(material.base, delta, tmp_path / "merged", DeltaError)


def no_such_expert(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME.replace("experts.2", "experts.4")] = tensors[NAME].clone()


def turned(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = tensors[NAME].t().contiguous()


def cut(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = tensors[NAME][:-1].contiguous()


def widened(tensors: Tensors, _: Manifest) -> None:
    tensors[NAME] = tensors[NAME].float()


def rows(*ids: int) -> Change:
    def change(_: Tensors, manifest: Manifest) -> None:
        manifest["tensors"][FUSED]["rows"] = list(ids)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_such_expert, "model.layers.0.mlp.experts.4.up_proj.weight: is not in the base"),
        (turned, f"tensor {NAME}: is BF16 [8, 4], BF16 [4, 8] is expected"),
        (cut, f"tensor {NAME}: is BF16 [3, 8], BF16 [4, 8] is expected"),
        (widened, f"tensor {NAME}: is F32 [4, 8], BF16 [4, 8] is expected"),
        (rows(3, 4), f"tensor {FUSED}: rows out of range, or twice the same: [3, 4]"),
        (rows(3, 3), f"tensor {FUSED}: rows out of range, or twice the same: [3, 3]"),
        (rows(3), f"tensor {FUSED}: is BF16 [2, 8, 8], BF16 [1, 8, 8] is expected"),
    ],
    ids=["no such expert", "turned", "cut", "dtype", "id out of range", "id twice", "too few ids"],
)
def test_s5_tensors_that_do_not_fit_the_base(
    change: Change, message: str, material: Material, tmp_path: Path
) -> None:
    delta = forge(material.plain, tmp_path / "delta", change)
    assert message in refusal(material.base, delta, tmp_path / "merged", DeltaError)


def points(folder: Path, index: str, old: str, new: str) -> None:
    """Let an index name another file."""
    text = (folder / index).read_text()
    assert f'"{old}"' in text
    (folder / index).write_text(text.replace(f'"{old}"', json.dumps(new)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gone.safetensors", "gone.safetensors: this weights file is missing"),
        ("../{stray}", "{index}: points outside the folder: '../{stray}'"),
        ("{parent}/{stray}", "{index}: points outside the folder: '{parent}/{stray}'"),
        ("link.safetensors", "link.safetensors: a symbolic link to {parent}/{stray}, outside"),
    ],
    ids=["missing", "parent folder", "absolute", "symbolic link"],
)
def test_s6_a_delta_s_index_that_points_elsewhere(
    target: str, message: str, material: Material, tmp_path: Path
) -> None:
    delta = copy(material.sharded, tmp_path / "delta")
    shard = sorted(delta.glob("*.safetensors"))[0]
    # What it points to is the right file, in the wrong place.
    stray = shutil.move(shard, tmp_path / "stray.safetensors")
    os.symlink(stray, delta / "link.safetensors")
    words = {"stray": stray.name, "parent": tmp_path, "index": f"{WEIGHTS}.index.json"}
    points(delta, words["index"], shard.name, target.format(**words))
    found = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.format(**words) in found


@pytest.mark.parametrize("target", ["gone.safetensors", "../stray.safetensors"])
def test_s6_a_base_s_index_that_points_elsewhere(
    target: str, material: Material, tmp_path: Path
) -> None:
    base = copy(material.base, tmp_path / "base")
    shutil.move(base / "model.safetensors", tmp_path / "stray.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(tmp_path / "stray.safetensors"), target)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    found = refusal(base, material.plain, tmp_path / "merged", ModelError)
    assert "is missing" in found or "points outside the folder" in found


@pytest.mark.parametrize("name", [CONFIG, BASE, WEIGHTS, "adapter_config.json"])
def test_a_file_that_is_a_link_out_of_the_folder(
    name: str, material: Material, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    if name == "adapter_config.json":
        delta.mkdir()
        (delta / name).write_text("{}")
        save_file({"lora_A": torch.ones(2)}, delta / "adapter_model.safetensors")
        write_manifest(delta, fingerprint(open_checkpoint(material.base)), {"method": "lora"})
        assert read_delta(delta).is_adapter
    else:
        copy(material.plain, delta)
    (delta / name).rename(tmp_path / "stray")
    (delta / name).symlink_to("../stray")
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / name}: a symbolic link to {tmp_path / 'stray'}, outside")


def test_a_delta_in_the_hub_s_cache_is_read(material: Material, tmp_path: Path) -> None:
    """There every file is a symbolic link, out of its folder."""
    snapshot = tmp_path / "models--me--delta" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    for number, path in enumerate(material.plain.iterdir()):
        blob = snapshot.parents[1] / "blobs" / str(number)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert export(snapshot, tmp_path / "again").tensors == len(load_file(material.plain / WEIGHTS))


@pytest.mark.parametrize("more", ["values", "frames"])
def test_more_coded_values_that_unfold_to_too_much(
    more: str, material: Material, tmp_path: Path
) -> None:
    """A few kilobytes that would decode to a gigabyte."""
    delta = copy(material.coded, tmp_path / "delta")
    tensors = load_file(delta / WEIGHTS)
    coder = zstandard.ZstdCompressor(level=19)
    frame = coder.compress(bytes(1 << 20))
    bomb = coder.compress(bytes(1 << 30)) if more == "values" else frame * 1024
    tensors[NAME] = torch.frombuffer(bytearray(bomb), dtype=torch.uint8)
    config = json.loads((delta / CONFIG).read_text())
    config["tensors"][NAME]["coded"] = {
        "bytes": len(bomb),
        "sha256": hashlib.sha256(raw(tensors[NAME])).hexdigest(),
    }
    save_file(tensors, delta / WEIGHTS)
    (delta / CONFIG).write_text(json.dumps(config))
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message == f"{delta}: tensor {NAME}: more values are coded than the tensor has"


def test_a_delta_forged_without_a_change_is_merged(material: Material, tmp_path: Path) -> None:
    """Otherwise the cases could fail for a reason of their own."""
    delta = forge(material.plain, tmp_path / "delta", lambda *_: None)
    merged = merge(material.base, delta, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (
        material.merged / "model.safetensors"
    ).read_bytes()

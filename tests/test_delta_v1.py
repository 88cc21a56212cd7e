"""Deltas of version 1: read as they were meant, and refused where they are damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.delta import read_delta
from esft.errors import DeltaError
from esft.shards import open_checkpoint
from tests.deltas import as_version_1
from tests.faults.material import FUSED, Material, flip, values

MANIFEST, WEIGHTS, BASE = "delta.json", "delta.safetensors", "base.json"
NAME = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def old(material: Material, tmp_path: Path) -> Path:
    return as_version_1(material.plain, tmp_path / "old")


def test_it_is_read_as_if_it_were_of_today(material: Material, old: Path) -> None:
    delta, wanted = read_delta(old), read_delta(material.plain)
    assert values(delta, open_checkpoint(material.base)) == material.values
    assert (delta.rows, delta.base) == (wanted.rows, wanted.base)
    assert delta.manifest["tensors"] == wanted.manifest["tensors"]
    assert delta.manifest["base"]["fingerprint"] == wanted.manifest["base"]["fingerprint"]
    assert (delta.method, delta.is_adapter, delta.coding) == ("esft", False, None)


def test_an_adapter(old: Path, tmp_path: Path) -> None:
    save_file({"lora_A": torch.ones(2)}, old / "adapter_model.safetensors")
    (old / "adapter_config.json").write_text("{}")
    (old / WEIGHTS).unlink()
    listed = ("adapter_model.safetensors", "adapter_config.json", BASE)
    rewrite(old, method="lora", rows={}, files={name: described(old / name) for name in listed})
    delta = read_delta(old)
    assert delta.is_adapter
    assert delta.entries == {}
    save_file({"lora_A": torch.tensor([1, float("nan")])}, old / "adapter_model.safetensors")
    rewrite(old, files={name: described(old / name) for name in listed})
    with pytest.raises(DeltaError, match="tensor lora_A has NaN"):
        read_delta(old)


def described(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rewrite(old: Path, **changes: Any) -> None:
    manifest = json.loads((old / MANIFEST).read_text())
    (old / MANIFEST).write_text(json.dumps(manifest | changes))


def forged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change the tensors and list the right hash."""

    def spoil(old: Path) -> None:
        tensors = load_file(old / WEIGHTS)
        change(tensors)
        save_file(tensors, old / WEIGHTS)
        rewrite(old, files={name: described(old / name) for name in (WEIGHTS, BASE)})

    return spoil


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME][1, 2] = float("nan")


def without_fused(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[FUSED]


def foreign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.more"] = torch.ones(2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda old: flip(old / WEIGHTS, -1, 3), f"{WEIGHTS}: damaged: its sha256 is not the one"),
        (lambda old: flip(old / BASE, -9, 0), f"{BASE}: damaged: its sha256 is not the one"),
        (lambda old: (old / BASE).unlink(), f"{BASE}: this file of the delta is missing"),
        (lambda old: (old / WEIGHTS).unlink(), f"{WEIGHTS}: this file of the delta is missing"),
        (lambda old: (old / MANIFEST).write_text("{"), f"{MANIFEST}:1: not JSON"),
        (lambda old: (old / MANIFEST).write_text("[]"), f"{MANIFEST}: expected a JSON object"),
        (lambda old: rewrite(old, format="esft-delta/0"), "format: expected"),
        (lambda old: rewrite(old, format="esft-delta/9"), "install a newer esft"),
        (lambda old: rewrite(old, method=3), f"{MANIFEST}: incomplete or of the wrong shape"),
        (lambda old: rewrite(old, base=None), f"{MANIFEST}: incomplete or of the wrong shape"),
        (lambda old: rewrite(old, files=[]), f"{MANIFEST}: incomplete or of the wrong shape"),
        (lambda old: rewrite(old, files={}), f"{BASE} is not listed under files"),
        (lambda old: rewrite(old, rows={}), f"{FUSED}: is BF16 [2, 8, 8], BF16 [4, 8, 8] is"),
        (lambda old: rewrite(old, rows={FUSED: [4, 0]}), f"{FUSED}: rows out of range"),
        (forged(nan), f"tensor {NAME} has NaN or infinite values"),
        (forged(without_fused), f"rows are listed for {FUSED}, which is not there"),
        (forged(foreign), "tensor model.more: is not in the base"),
    ],
)
def test_a_damaged_one_is_refused(spoil: Callable[[Path], Any], message: str, old: Path) -> None:
    spoil(old)
    with pytest.raises(DeltaError) as caught:
        read_delta(old)
    assert message in str(caught.value)

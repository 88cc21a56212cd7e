"""A delta of low-rank factors as files: damage is named before any value is computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esft.delta import read_delta
from esft.errors import DeltaError
from esft.merging import merge, verify
from tests.deltas import CONFIG, WEIGHTS, raw
from tests.faults.material import Material

NAME = "model.layers.1.mlp.experts.3.down_proj.weight"
LEFT, RIGHT = f"{NAME}.left", f"{NAME}.right"
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(tmp_path / "material")


def test_it_merges(material: Material, tmp_path: Path) -> None:
    merged = merge(material.base, material.low_rank, tmp_path / "merged")
    verify(material.base, material.low_rank, merged)
    found = load_file(merged / "model.safetensors")
    assert raw(found[NAME]) == material.low_rank_values[NAME]


def test_a_flipped_bit_is_named(material: Material) -> None:
    file = material.low_rank / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DeltaError, match=r"tensor \S+\.(left|right): damaged: its sha256 is not"):
        read_delta(material.low_rank)


def not_finite(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[LEFT][0, 0] = torch.nan


def absent(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    del tensors[RIGHT]


def unknown(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["other.left"] = torch.zeros(2, 2)


def other_rank(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[LEFT] = tensors[LEFT][:, :1].contiguous()


def too_small(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[LEFT] = tensors[LEFT][:1].contiguous()


def no_rank(_: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    manifest["low_rank"]["r"] = 0


def no_section(_: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    del manifest["low_rank"]


def no_factors(_: dict[str, Tensor], manifest: dict[str, Any]) -> None:
    del manifest["tensors"][NAME]["factors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_finite, f"tensor {LEFT} has NaN or infinite values"),
        (absent, f"tensor {RIGHT}: in the manifest but not in the weights"),
        (unknown, "tensor other.left: in the weights but not in the manifest"),
        (other_rank, f"the factors of tensor {NAME} are [8, 1] and [2, 4]"),
        (too_small, f"the factors of tensor {NAME} are [1, 2] and [2, 4]"),
        (no_rank, "low_rank: needs r above 0, and alpha"),
        (no_section, "low_rank: needs r above 0, and alpha"),
        (no_factors, f"tensor {NAME}: factors and coding do not agree"),
    ],
)
def test_what_a_forger_might_write(material: Material, change: Change, message: str) -> None:
    file, config = material.low_rank / WEIGHTS, material.low_rank / CONFIG
    tensors, manifest = load_file(file), json.loads(config.read_text())
    change(tensors, manifest)
    for name, about in manifest["tensors"].items():  # every hash is right
        for side in about.get("factors", {}):
            value = tensors.get(f"{name}.{side}")
            if value is not None:
                about["factors"][side] = hashlib.sha256(raw(value)).hexdigest()
    save_file(tensors, file)
    config.write_text(json.dumps(manifest))
    with pytest.raises(DeltaError) as caught:
        read_delta(material.low_rank)
    assert message in str(caught.value)


def test_factors_that_lead_elsewhere_are_refused(material: Material, tmp_path: Path) -> None:
    config = material.low_rank / CONFIG
    manifest = json.loads(config.read_text())
    manifest["low_rank"]["alpha"] = 5
    config.write_text(json.dumps(manifest))
    with pytest.raises(DeltaError, match="decoded to other values"):
        merge(material.base, material.low_rank, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()

"""I1 to I4: the base, merging again, versions of the format, and a merge that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esft.delta import read_delta
from esft.errors import CheckError, DeltaError, OutputError
from esft.exporting import export
from esft.merging import merge, verify
from tests.command import python_process
from tests.deltas import CONFIG, as_version_1, forge
from tests.faults.material import (
    TOKENIZER,
    Material,
    change_config,
    copy,
    refusal,
    save,
    tensors_of_base,
)

NORM = "model.norm.weight"


def renamed(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(".mlp.", ".block_sparse_moe."): t for name, t in base.items()}


def one_more(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return base | {"model.extra.weight": torch.ones(3)}


def one_element(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    base[NORM][3] += 1
    return base


def other_seed(_: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors_of_base(seed=7)


def other_dtype(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in base.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "tensor model.layers.0.mlp.experts.0.down_proj.weight is missing from it"),
        (one_more, "tensor model.extra.weight is not in the base"),
        (one_element, f"tensor {NORM} has other values"),
        (other_seed, "has other values"),
        (other_dtype, "has dtype F16 there, BF16 in the base"),
    ],
    ids=["architecture", "one tensor more", "one number", "all numbers", "dtype"],
)
def test_i1_another_base(
    change: Callable[..., Any], message: str, material: Material, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", change(tensors_of_base()))
    found = refusal(base, material.plain, tmp_path / "merged", CheckError)
    assert found.startswith(f"{base}: the delta was made from another base: ")
    assert message in found


def test_i1_another_tokenizer(material: Material, tmp_path: Path) -> None:
    base = copy(material.base, tmp_path / "base")
    vocab = {"a": 1, "b": 0, "ab": 2}
    other = TOKENIZER | {"model": TOKENIZER["model"] | {"vocab": vocab}}
    (base / "tokenizer.json").write_text(json.dumps(other))
    found = refusal(base, material.plain, tmp_path / "merged", CheckError)
    assert found.endswith("another base: tokenizer.json gives other ids to texts")


def test_i1_the_same_tokenizer_written_by_another_version(
    material: Material, tmp_path: Path
) -> None:
    base = copy(material.base, tmp_path / "base")
    spelled = {"merges": ["a b"], "type": "BPE", "vocab": {"ab": 2, "b": 1, "a": 0}}
    same = {"padding": {"length": 3}, "added_tokens": TOKENIZER["added_tokens"], "model": spelled}
    (base / "tokenizer.json").write_text(json.dumps(same, indent=4))
    assert verify(base, material.plain, material.merged).merged is not None
    merge(base, material.plain, tmp_path / "merged")


def test_i1_the_same_base_cut_into_other_files(material: Material, tmp_path: Path) -> None:
    base = save(tmp_path / "base", tensors_of_base(), shards=4)
    merged = merge(base, material.plain, tmp_path / "merged")
    found: dict[str, torch.Tensor] = {}
    for file in merged.glob("*.safetensors"):
        found |= load_file(file)
    wanted = load_file(material.merged / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_i2_onto_its_own_merge(material: Material, tmp_path: Path) -> None:
    message = refusal(material.merged, material.plain, tmp_path / "merged", CheckError)
    assert "has the delta's values already; give the base, not a merged checkpoint" in message


def test_i2_onto_the_merge_of_another_delta(material: Material, tmp_path: Path) -> None:
    def negated(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> None:
        for tensor in tensors.values():
            tensor.neg_()

    other = forge(material.plain, tmp_path / "other", negated)
    base = merge(material.base, other, tmp_path / "base")
    message = refusal(base, material.plain, tmp_path / "merged", CheckError)
    assert message.startswith(f"{base}: the delta was made from another base: tensor ")
    assert message.endswith(" has other values")


def unchanged(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_i2_twice_to_the_same_place(material: Material, tmp_path: Path) -> None:
    merged = merge(material.base, material.plain, tmp_path / "merged")
    before = unchanged(merged)
    assert "not empty" in refusal(material.base, material.plain, merged, OutputError)
    assert unchanged(merged) == before


def test_i2_in_place(material: Material, tmp_path: Path) -> None:
    base = copy(material.base, tmp_path / "base")
    before = unchanged(base)
    assert "not empty" in refusal(base, material.plain, base, OutputError)
    assert unchanged(base) == before


def test_i3_version_1_is_merged(material: Material, tmp_path: Path) -> None:
    old = as_version_1(material.plain, tmp_path / "old")
    merged = merge(material.base, old, tmp_path / "merged")
    assert (merged / "model.safetensors").read_bytes() == (
        material.merged / "model.safetensors"
    ).read_bytes()


def test_i3_version_1_is_brought_up_to_date(material: Material, tmp_path: Path) -> None:
    old = as_version_1(material.plain, tmp_path / "old")
    export(old, tmp_path / "new")
    new, wanted = read_delta(tmp_path / "new"), read_delta(material.plain)
    assert new.manifest["format"] == "esft-delta/2"
    assert new.manifest["tensors"] == wanted.manifest["tensors"]
    assert new.manifest["recipe"] == {"model": "tiny"}
    assert new.base == wanted.base
    assert (tmp_path / "new" / "esft_delta.safetensors").read_bytes() == (
        material.plain / "esft_delta.safetensors"
    ).read_bytes()


def test_i3_a_newer_version(material: Material, tmp_path: Path) -> None:
    delta = copy(material.plain, tmp_path / "delta")
    change_config(delta, format="esft-delta/3")
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / CONFIG}: the delta's format is esft-delta/3, and esft ")
    assert message.endswith("install a newer esft: pip install --upgrade esft")


def test_i3_no_version_at_all(material: Material, tmp_path: Path) -> None:
    delta = copy(material.plain, tmp_path / "delta")
    change_config(delta, format="esft-delta/two")
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message == f"{delta / CONFIG}: format: expected \"esft-delta/2\", found 'esft-delta/two'"


MOMENTS = (
    "at its first file",
    "at its second file",
    "in the middle",
    "at its last file",
    "while it is synced",
    "before it is renamed",
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Merge in processes that are killed; see `killed_merge.py`. One start for all of them."""
    root = tmp_path_factory.mktemp("killed")
    base = save(root / "base", tensors_of_base(), shards=4)
    material = Material(root / "material")
    script = Path(__file__).parent / "killed_merge.py"
    done = python_process(script, base, material.plain, root / "work" / "out", *MOMENTS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("moment", MOMENTS)
def test_i4_a_merge_that_is_killed(moment: str, killed: dict[str, Any]) -> None:
    found = killed[moment]
    assert found["signal"] == 9
    assert found["out_exists"] is False
    # Nothing is in the way of the next one, which gives what an undisturbed one gives.
    assert found["merged_again"] == killed["undisturbed"]

"""Hashes of a checkpoint's tensors: of their bytes alone, however the files are cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esft.errors import CheckError
from esft.fingerprint import Fingerprint, check_base, fingerprint
from esft.shards import INDEX, SINGLE, open_checkpoint

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "z": torch.randn(7, 3, generator=GENERATOR),
    "a": torch.randn(4, 2, 5, generator=GENERATOR).to(torch.bfloat16),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float16),
    "large": torch.arange(2 << 20, dtype=torch.int32),  # 8 MiB: more than one read
    "empty": torch.zeros(0, 2),
}


def oracle(tensors: dict[str, torch.Tensor]) -> Fingerprint:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return {
        name: {
            "dtype": names.get(tensor.dtype, "I32"),
            "shape": list(tensor.shape),
            # numpy has no bfloat16; its bytes are the same as 16-bit numbers'.
            "sha256": hashlib.sha256(
                (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor)
                .numpy()
                .tobytes()
            ).hexdigest(),
        }
        for name, tensor in tensors.items()
    }


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / SINGLE)
    return folder


def cut(folder: Path, shards: list[list[str]]) -> Path:
    """Save the tensors in several files, listed in the index in another order."""
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(shards):
        save_file({name: TENSORS[name] for name in names}, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    reverse = dict(reversed(weight_map.items()))
    (folder / INDEX).write_text(json.dumps({"weight_map": reverse}))
    return folder


def test_hashes_are_hashlib_s_of_the_tensors_bytes(tmp_path: Path) -> None:
    found = fingerprint(open_checkpoint(saved(tmp_path / "base", TENSORS)))
    assert found == oracle(TENSORS)
    assert list(found) == sorted(TENSORS)


@pytest.mark.parametrize(
    "shards",
    [
        [["large"], ["z", "a", "nan", "empty"]],
        [["nan"], ["empty"], ["a"], ["z"], ["large"]],
        [["a", "z"], ["large", "empty"], ["nan"]],
    ],
)
def test_neither_order_nor_files_matter(shards: list[list[str]], tmp_path: Path) -> None:
    found = fingerprint(open_checkpoint(cut(tmp_path / "cut", shards)))
    assert json.dumps(found) == json.dumps(
        fingerprint(open_checkpoint(saved(tmp_path / "one", TENSORS)))
    )


def test_a_base_is_recognised_by_all_it_has(tmp_path: Path) -> None:
    expected = oracle(TENSORS)
    check_base(
        expected, open_checkpoint(cut(tmp_path / "base", [["a", "nan"], ["large", "z", "empty"]]))
    )
    others = {
        "tensor z is missing from it": {k: v for k, v in TENSORS.items() if k != "z"},
        "tensor more is not in the base": TENSORS | {"more": torch.zeros(1)},
        "tensor a has dtype F16 there, BF16 in the base": TENSORS | {"a": TENSORS["a"].half()},
        "tensor z has shape [3, 7] there, [7, 3] in the base": TENSORS
        | {"z": TENSORS["z"].view(3, 7)},
    }
    for number, (message, tensors) in enumerate(others.items()):
        folder = saved(tmp_path / str(number), tensors)
        for hashes in (True, False):
            with pytest.raises(CheckError) as caught:
                check_base(expected, open_checkpoint(folder), hashes=hashes)
            assert str(caught.value) == f"{folder}: the delta was made from another base: {message}"


def test_one_bit_of_a_base_is_noticed_by_its_hash_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", TENSORS)
    data = bytearray((folder / SINGLE).read_bytes())
    data[open_checkpoint(folder).entries["large"].end - 1] ^= 1
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(CheckError, match="tensor large has other values"):
        check_base(oracle(TENSORS), open_checkpoint(folder))
    check_base(oracle(TENSORS), open_checkpoint(folder), hashes=False)

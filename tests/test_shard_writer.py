"""Files written tensor by tensor: the library reads them, and finds what was meant."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import OutputError
from esft.shard_writer import Source, write_shards
from tests.deltas import NAMES, raw

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "x": torch.arange(5, dtype=torch.float32),  # wide, so it goes first, whatever its name
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "c": torch.arange(64, dtype=torch.bfloat16),
    "ü": torch.ones(1, dtype=torch.float16),
}


def source(name: str, tensor: torch.Tensor) -> Source:
    data = raw(tensor)
    pieces = [data[:3], data[3:]]
    return Source(name, NAMES[tensor.dtype], tuple(tensor.shape), len(data), lambda: pieces)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    written = write_shards(tmp_path, "x", [source(*item) for item in TENSORS.items()])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert written[name].sha256 == hashlib.sha256(raw(tensor)).hexdigest()
        assert written[name].bytes == tensor.nbytes
    # Its tensors lie where the library itself would put them.
    save_file(TENSORS, tmp_path / "y.safetensors")
    ours, theirs = (
        (tmp_path / name).read_bytes()[-sum(t.nbytes for t in TENSORS.values()) :]
        for name in ("x.safetensors", "y.safetensors")
    )
    assert ours == theirs
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("size", [0, 1, 10, 99_999, 300_000])
def test_a_length_that_shows_when_it_is_written(size: int, tmp_path: Path) -> None:
    tensors = [
        Source("coded", "U8", None, 10, lambda: [b"x" * size]),
        source("after", TENSORS["c"]),
    ]
    assert write_shards(tmp_path, "x", tensors)["coded"].bytes == size
    found = load_file(tmp_path / "x.safetensors")
    assert found["coded"].shape == (size,)
    assert bytes(found["coded"].numpy()) == b"x" * size
    assert torch.equal(found["after"], TENSORS["c"])


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (162, 1), (161, 2), (130, 2), (20, 4)])
def test_shards_stay_within_the_limit(limit: int, files: int, tmp_path: Path) -> None:
    write_shards(tmp_path, "x", [source(*item) for item in TENSORS.items()], limit=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    loaded = {path.name: load_file(path) for path in shards}
    assert len(shards) == files
    for tensors in loaded.values():
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    if files == 1:
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
        return
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert [path.name for path in shards] == [
        f"x-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)
    ]
    assert index["weight_map"] == {
        name: file for file, tensors in loaded.items() for name in tensors
    }
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())


def test_nothing_to_write_is_a_file_without_tensors(tmp_path: Path) -> None:
    write_shards(tmp_path, "x", [])
    assert load_file(tmp_path / "x.safetensors") == {}


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot write"):
        write_shards(tmp_path / "gone", "x", [source("x", TENSORS["x"])])

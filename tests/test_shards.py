"""Where tensors lie in files; headers and indexes that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from esft.errors import ModelError
from esft.shards import INDEX, SINGLE, open_checkpoint, read_blocks, read_header

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "b": torch.randn(3, 5, generator=GENERATOR),
    "a": torch.randn(2, 2, 2, generator=GENERATOR).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_entries_are_where_the_bytes_are(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE, metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == (tmp_path / SINGLE,)
    assert checkpoint.entries.keys() == TENSORS.keys()
    data = (tmp_path / SINGLE).read_bytes()
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    names |= {torch.float16: "F16", torch.uint8: "U8"}
    for name, tensor in TENSORS.items():
        entry = checkpoint.entries[name]
        assert (entry.dtype, entry.shape) == (names[tensor.dtype], tuple(tensor.shape))
        assert data[entry.start : entry.end] == raw(tensor)
        assert b"".join(read_blocks(entry)) == raw(tensor)
    entry = checkpoint.entries["b"]
    assert b"".join(read_blocks(entry, 8, 20)) == raw(TENSORS["b"])[8:20]
    order = [entry for _, entry in checkpoint.in_file(tmp_path / SINGLE)]
    assert [entry.start for entry in order[1:]] == [entry.end for entry in order[:-1]]


def test_a_tensor_larger_than_one_read(tmp_path: Path) -> None:
    large = torch.arange(3 << 20, dtype=torch.int32)  # 12 MiB, three reads
    save_file({"large": large}, tmp_path / SINGLE)
    blocks = list(read_blocks(open_checkpoint(tmp_path).entries["large"]))
    assert len(blocks) == 3
    assert b"".join(blocks) == raw(large)


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    entries = open_checkpoint(tmp_path).entries
    last = max(entries.values(), key=lambda entry: entry.end)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[: last.end - 1])
    with pytest.raises(ModelError, match=r"model\.safetensors: ends in the middle of a tensor"):
        list(read_blocks(last))


def honest() -> dict[str, Any]:
    return {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]},
    }


def packed(header: Any, payload: int = 20, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(payload)


def lying(name: str, **changes: Any) -> bytes:
    header = honest()
    header[name] |= changes
    return packed(header)


GOOD = packed(honest())
HEADER = len(GOOD) - 20


@pytest.mark.parametrize(
    "data",
    [
        *(GOOD[:size] for size in (0, 1, 7, 8, 9, HEADER // 2, HEADER - 1, HEADER, len(GOOD) - 1)),
        GOOD + b"\0",
        packed(honest(), length=2**63 - 1),
        packed(honest(), length=2**64 - 1),
        packed(honest(), length=len(GOOD)),
        packed(honest(), length=HEADER - 9),
        packed(honest(), length=0),
        lying("b", data_offsets=[4, 16]),
        lying("b", data_offsets=[0, 12]),
        lying("b", data_offsets=[12, 24]),
        lying("b", data_offsets=[20, 8]),
        lying("b", data_offsets=[-12, 0]),
        lying("b", data_offsets=[8, 2**63]),
        lying("b", data_offsets=[8]),
        lying("b", shape=[4]),
        lying("b", shape=[-3]),
        lying("b", shape=[2**40, 2**40]),
        lying("b", dtype="F64"),
        lying("b", dtype="F99"),
        packed({"a": honest()["a"]}),
        packed({"a": {"dtype": "F32", "shape": [2]}}, payload=8),
        packed([honest()]),
        packed({"a": 3}),
        packed(b'{"a": '),
        packed(b'{"\xff\xfe": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', payload=8),
        packed(b"[" * 100_000),
        b"\x80\x04" + bytes(100),
    ],
)
def test_a_lying_header_is_refused_by_the_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    for read in (lambda: read_header(tmp_path / SINGLE), lambda: open_checkpoint(tmp_path)):
        with pytest.raises(ModelError) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path / SINGLE}: this weights file is damaged")


def test_the_honest_header_is_read(tmp_path: Path) -> None:
    """Otherwise the test above could fail for a reason of `packed`."""
    (tmp_path / SINGLE).write_bytes(GOOD)
    assert {name: entry.end for name, entry in read_header(tmp_path / SINGLE).items()} == {
        "a": HEADER + 8,
        "b": HEADER + 20,
    }


def sharded(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"c": torch.zeros(4)}, folder / "stray.safetensors")
    checkpoint = open_checkpoint(folder)
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]
    assert {name: entry.file.name for name, entry in checkpoint.entries.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "the weight_map is empty"),
        (None, "no weight_map"),
        ([], "no weight_map"),
        ("one.safetensors", "no weight_map"),
        ({"a": "../one.safetensors"}, "points outside the folder: '../one.safetensors'"),
        ({"a": "/etc/passwd"}, "points outside the folder: '/etc/passwd'"),
        ({"a": "sub/one.safetensors"}, "points outside the folder: 'sub/one.safetensors'"),
        ({"a": ".."}, "points outside the folder: '..'"),
        ({"a": "."}, "points outside the folder: '.'"),
        ({"a": ""}, "points outside the folder: ''"),
        ({"a": 5}, "points outside the folder: 5"),
        ({"a": None}, "points outside the folder: None"),
        ({"a": 5, "b": "one.safetensors"}, "points outside the folder: 5"),
        ({"a": ["one.safetensors"]}, "no weight_map"),
    ],
)
def test_a_lying_index_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")  # what `..` would reach
    folder = sharded(tmp_path / "checkpoint", weight_map)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder / INDEX}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b"7", b"{}", b"[" * 100_000])
def test_an_index_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(data)
    with pytest.raises(ModelError, match=INDEX.replace(".", r"\.")):
        open_checkpoint(tmp_path)


def same_tensor_twice(folder: Path) -> str:
    sharded(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2)}, folder / "two.safetensors")
    return f"{folder / 'two.safetensors'}: tensor a is also in one.safetensors"


def missing_shard(folder: Path) -> str:
    sharded(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    return f"{folder / 'three.safetensors'}: this weights file is missing"


def folder_for_a_shard(folder: Path) -> str:
    sharded(folder, {"a": "one.safetensors", "b": "three.safetensors"})
    (folder / "three.safetensors").mkdir()
    return f"{folder / 'three.safetensors'}: this weights file is damaged"


def both_kinds(folder: Path) -> str:
    """transformers would read the one, a merge could change the other."""
    sharded(folder, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / SINGLE)
    return f"{folder}: holds both {SINGLE} and {INDEX}"


def nothing(folder: Path) -> str:
    return f"{folder}: no {SINGLE} and no {INDEX}"


def pickles(folder: Path) -> str:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return f"{folder / 'pytorch_model.bin'}: pickled weights"


@pytest.mark.parametrize(
    "make",
    [same_tensor_twice, missing_shard, folder_for_a_shard, both_kinds, nothing, pickles],
)
def test_a_folder_that_is_no_checkpoint_is_refused(
    make: Callable[[Path], str], tmp_path: Path
) -> None:
    message = make(tmp_path)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(message)

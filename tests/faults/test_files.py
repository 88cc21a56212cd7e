"""S1 to S3: files that are cut short, lie about their content, or have a bit flipped."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esft.delta import read_delta
from esft.errors import CheckError, DeltaError, ModelError
from esft.merging import merge
from esft.shards import open_checkpoint
from tests.deltas import BASE, CONFIG, WEIGHTS
from tests.faults.material import Material, copy, flip, payload_start, refusal

# Where files are cut: a number of bytes from the start, from the header's end, or from the end.
OFFSETS = [
    *(("start", n) for n in (0, 1, 7, 8, 9, 300)),
    *(("payload", n) for n in (-9, -1, 0, 1, 63, 64, 200)),
    *(("end", n) for n in (-65, -2, -1)),
]


def cut(file: Path, where: str, offset: int) -> None:
    data = file.read_bytes()
    size = {"start": 0, "payload": payload_start(file), "end": len(data)}[where] + offset
    assert 0 <= size < len(data)
    file.write_bytes(data[:size])


@pytest.mark.parametrize(("where", "offset"), OFFSETS)
def test_s1_a_delta_cut_short(where: str, offset: int, material: Material, tmp_path: Path) -> None:
    delta = copy(material.plain, tmp_path / "delta")
    cut(delta / WEIGHTS, where, offset)
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / WEIGHTS}: ")


@pytest.mark.parametrize(("where", "offset"), OFFSETS[::2])
def test_more_a_compressed_delta_cut_short(
    where: str, offset: int, material: Material, tmp_path: Path
) -> None:
    delta = copy(material.coded, tmp_path / "delta")
    cut(delta / WEIGHTS, where, offset)
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / WEIGHTS}: ")


@pytest.mark.parametrize("name", [CONFIG, BASE, f"{WEIGHTS}.index.json"])
@pytest.mark.parametrize("share", [0, 0.7])
def test_more_json_cut_short(name: str, share: float, material: Material, tmp_path: Path) -> None:
    delta = copy(material.sharded, tmp_path / "delta")
    data = (delta / name).read_bytes()
    (delta / name).write_bytes(data[: int(share * len(data))])
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / name}:")


@contextmanager
def little_memory(room: int = 256 << 20) -> Iterator[None]:
    """Within the block the process may grow by `room` bytes and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


Header = dict[str, Any]


def parts(file: Path) -> tuple[Header, bytes]:
    data = file.read_bytes()
    start = payload_start(file)
    return json.loads(data[8:start]), data[start:]


def packed(text: bytes, payload: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def lying(file: Path, lie: str) -> bytes:
    """Return a file of the same content whose header lies."""
    header, payload = parts(file)
    names = sorted(name for name in header if name != "__metadata__")
    names.sort(key=lambda name: header[name]["data_offsets"])
    first, second, last = header[names[0]], header[names[1]], header[names[-1]]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    if lie == "huge length":
        return packed(json.dumps(header).encode(), payload, length=2**63 - 1)
    if lie == "length beyond the file":
        return packed(json.dumps(header).encode(), payload, length=99_000_000)
    if lie == "overlap":
        second["data_offsets"] = first["data_offsets"]
        second["shape"] = first["shape"]
    if lie == "hole":
        for item in (header[name] for name in names[1:]):
            item["data_offsets"] = [offset + size for offset in item["data_offsets"]]
        payload = payload[:size] + bytes(size) + payload[size:]
    if lie == "duplicate":
        text = json.dumps(header)
        return packed((text[:-1] + f', "{names[0]}": {json.dumps(first)}}}').encode(), payload)
    if lie == "not UTF-8":
        text = json.dumps(header).replace(names[0], "?" * len(names[0]))
        return packed(text.encode().replace(b"?", b"\xff"), payload)
    if lie == "overflow of the shape":
        last["shape"] = [2**40, 2**40]
    if lie == "offsets beyond the file":
        last["data_offsets"] = [offset + 2**62 for offset in last["data_offsets"]]
    if lie == "offsets backwards":
        last["data_offsets"] = last["data_offsets"][::-1]
    if lie == "a dtype of another width":
        last["dtype"] = "F64"
    return packed(json.dumps(header).encode(), payload)


LIES = [
    "huge length",
    "length beyond the file",
    "overlap",
    "hole",
    "duplicate",
    "not UTF-8",
    "overflow of the shape",
    "offsets beyond the file",
    "offsets backwards",
    "a dtype of another width",
]


@pytest.mark.parametrize("lie", LIES)
def test_s2_a_header_that_lies(lie: str, material: Material, tmp_path: Path) -> None:
    delta = copy(material.plain, tmp_path / "delta")
    (delta / WEIGHTS).write_bytes(lying(delta / WEIGHTS, lie))
    with little_memory():
        message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert message.startswith(f"{delta / WEIGHTS}: this weights file is damaged")


@pytest.mark.parametrize("lie", ["huge length", "overlap", "duplicate", "overflow of the shape"])
def test_more_a_base_s_header_that_lies(lie: str, material: Material, tmp_path: Path) -> None:
    base = copy(material.base, tmp_path / "base")
    file = base / "model.safetensors"
    file.write_bytes(lying(file, lie))
    with little_memory():
        message = refusal(base, material.plain, tmp_path / "merged", ModelError)
    assert message.startswith(f"{file}: this weights file is damaged")


def flipped(delta: Path, where: str) -> str:
    """Flip a bit of the weights; return the name of the tensor it belongs to."""
    entries = read_delta(delta).entries
    in_order = sorted(entries, key=lambda name: (entries[name].file.name, entries[name].start))
    name, byte, bit = {
        "first bit": (in_order[0], 0, 0),
        "last bit": (in_order[-1], -1, 7),
        "sign": (in_order[2], 1, 7),
        "exponent": (in_order[3], 5, 2),
        "last place": (in_order[4], 6, 0),
        "a fused row": ("model.layers.2.mlp.experts.gate_up_proj", -3, 4),
        "the second file": (in_order[1], 4, 0),
        "the last file": (in_order[-1], 9, 1),
        "the middle": (in_order[5], 12, 5),
    }[where]
    entry = entries[name]
    flip(entry.file, (entry.start if byte >= 0 else entry.end) + byte, bit)
    return name


@pytest.mark.parametrize(
    ("which", "where"),
    [
        ("plain", "first bit"),
        ("plain", "last bit"),
        ("plain", "sign"),
        ("plain", "exponent"),
        ("plain", "last place"),
        ("plain", "a fused row"),
        ("sharded", "the second file"),
        ("sharded", "the last file"),
    ],
)
def test_s3_a_flipped_bit(which: str, where: str, material: Material, tmp_path: Path) -> None:
    delta = copy(getattr(material, which), tmp_path / "delta")
    name = flipped(delta, where)
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert f"tensor {name}: damaged: its sha256 is not the one in {CONFIG}" in message


@pytest.mark.parametrize("where", ["first bit", "last bit", "the middle", "a fused row"])
def test_more_a_flipped_bit_in_a_compressed_delta(
    where: str, material: Material, tmp_path: Path
) -> None:
    delta = copy(material.coded, tmp_path / "delta")
    name = flipped(delta, where)
    message = refusal(material.base, delta, tmp_path / "merged", DeltaError)
    assert f"tensor {name}: damaged: its sha256 is not the one in {CONFIG}" in message


@pytest.mark.parametrize("which", ["plain", "coded"])
@pytest.mark.parametrize("changed", [True, False])
def test_more_a_flipped_bit_in_the_base(
    which: str, changed: bool, material: Material, tmp_path: Path
) -> None:
    """In a tensor that the delta replaces, and in one that it does not."""
    base = copy(material.base, tmp_path / "base")
    name = "model.layers.1.mlp.experts.3.up_proj.weight" if changed else "model.norm.weight"
    entry = open_checkpoint(base).entries[name]
    flip(entry.file, entry.start + 3, 1)
    message = refusal(base, getattr(material, which), tmp_path / "merged", CheckError)
    assert message == (
        f"{base}: the delta was made from another base: tensor {name} has other values"
    )


def test_what_is_left_alone_is_merged(material: Material, tmp_path: Path) -> None:
    """Otherwise the cases could fail for a reason of their own."""
    wanted = (material.merged / "model.safetensors").read_bytes()
    for which in ("plain", "sharded", "coded"):
        delta = copy(getattr(material, which), tmp_path / which)
        with little_memory(1 << 30):
            merged = merge(material.base, delta, tmp_path / f"merged {which}")
        assert (merged / "model.safetensors").read_bytes() == wanted

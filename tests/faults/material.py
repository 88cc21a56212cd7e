"""A base and deltas of a few kilobytes, made by hand: no model, no training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esft.changes import Changed
from esft.delta import Delta, read_delta, write_delta
from esft.errors import EsftError
from esft.exporting import export
from esft.fingerprint import fingerprint, tokenizer_digest
from esft.low_rank_delta import Factors, write_low_rank_delta
from esft.merging import merge
from esft.shards import Checkpoint, open_checkpoint, read_blocks
from tests.deltas import CONFIG

EXPERTS = 4
FUSED = "model.layers.2.mlp.experts.gate_up_proj"
PICKED = {0: (2, 0), 1: (3,), 2: (3, 1)}
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 3, "content": "<s>"}],
    "padding": None,
}


def tensors_of_base(seed: int = 0) -> dict[str, Tensor]:
    """Two layers of experts apart, one fused, and something besides."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": random(16, 8), "model.norm.weight": random(8)}
    for layer in (0, 1):
        for expert in range(EXPERTS):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            tensors[f"{prefix}.gate_proj.weight"] = random(4, 8)
            tensors[f"{prefix}.up_proj.weight"] = random(4, 8)
            tensors[f"{prefix}.down_proj.weight"] = random(8, 4)
    return tensors | {FUSED: random(EXPERTS, 8, 8)}


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """Save a checkpoint with a configuration and a tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"{n % shards}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        own = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def trained(tensors: dict[str, Tensor]) -> list[Changed]:
    """Move the picked experts a little, as training would."""
    generator = torch.Generator().manual_seed(1)
    changes = []
    for name, tensor in tensors.items():
        moved = tensor + torch.randn(tensor.shape, generator=generator) * 1e-4
        if name == FUSED:
            changes.append(Changed(name, moved[list(PICKED[2])], PICKED[2]))
        elif any(f"layers.{la}.mlp.experts.{e}." in name for la in (0, 1) for e in PICKED[la]):
            changes.append(Changed(name, moved))
    return changes


def save_delta(base: Path, folder: Path, **options: Any) -> Path:
    """Write the delta that training the base would give."""
    folder.mkdir(parents=True)
    about = {"method": "esft", "base": {"name": "tiny", "tokenizer": tokenizer_digest(base)}}
    hashed = fingerprint(open_checkpoint(base))
    tensors = load_file(base / "model.safetensors")
    write_delta(folder, hashed, trained(tensors), about, **options)
    return folder


def save_low_rank(base: Path, folder: Path) -> Path:
    """Write the delta of low-rank factors that training the picked experts' would give."""
    folder.mkdir(parents=True)
    about = {"method": "hot-lora", "base": {"name": "tiny", "tokenizer": tokenizer_digest(base)}}
    generator = torch.Generator().manual_seed(2)
    tensors = load_file(base / "model.safetensors")
    changes, factors = [], []
    for change in trained(tensors):
        *stack, p, q = change.value.shape
        left = torch.randn(*stack, p, 2, generator=generator) * 0.01
        right = torch.randn(*stack, 2, q, generator=generator)
        before = tensors[change.name]
        before = before if change.rows is None else before[list(change.rows)]
        value = (before.double() + 4 / 2 * left.double() @ right.double()).float()
        changes.append(Changed(change.name, value, change.rows))
        factors.append(Factors(change.name, left, right))
    hashed = fingerprint(open_checkpoint(base))
    write_low_rank_delta(folder, hashed, changes, factors, about, r=2, alpha=4)
    return folder


class Material:
    """What every case starts from; made once and never changed.

    Attributes:
        base: a checkpoint.
        plain: its delta in one file.
        sharded: the same in several files.
        coded: the same, compressed.
        low_rank: another of the same tensors, as factors; `low_rank_values` are what they lead to.
        merged: the right result.
        values: the delta's tensors, as bytes; `rows` the rows that they are.
        fingerprint: the base's, as the delta has it.
    """

    def __init__(self, root: Path) -> None:
        self.base = save(root / "base", tensors_of_base())
        self.plain = save_delta(self.base, root / "plain")
        self.sharded = save_delta(self.base, root / "sharded", shard_size=200)
        self.coded = root / "coded"
        export(self.plain, self.coded, base=self.base, compress=True)
        self.low_rank = save_low_rank(self.base, root / "low-rank")
        self.merged = merge(self.base, self.plain, root / "merged")
        delta = read_delta(self.plain)
        self.values = values(delta, open_checkpoint(self.base))
        self.low_rank_values = values(read_delta(self.low_rank), open_checkpoint(self.base))
        self.rows, self.fingerprint = delta.rows, delta.base


def values(delta: Delta, base: Checkpoint) -> dict[str, bytes]:
    """Read, and decode where needed, all tensors of a delta."""
    with delta.plain(base) as plain:
        return {name: b"".join(read_blocks(entry)) for name, entry in plain.entries.items()}


def copy(folder: Path, to: Path) -> Path:
    """Copy a folder to where a test may spoil it."""
    shutil.copytree(folder, to)
    return to


def refusal(base: Path, delta: Path, out: Path, kind: type[EsftError]) -> str:
    """Merge, which must fail with this error and leave nothing behind; return the message."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as caught:
        merge(base, delta, out)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def change_config(delta: Path, **changes: Any) -> None:
    """Replace keys of a delta's manifest."""
    config = json.loads((delta / CONFIG).read_text())
    (delta / CONFIG).write_text(json.dumps(config | changes))


def payload_start(file: Path) -> int:
    """Return the byte after a safetensors file's header."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip(file: Path, byte: int, bit: int) -> None:
    """Flip one bit; a negative byte counts from the end."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)

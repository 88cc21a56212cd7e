"""Small checkpoints and deltas for tests, made without `esft.train`."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from esft.changes import expert_changes
from esft.delta import write_delta
from esft.experts import attach, detach
from esft.fingerprint import fingerprint
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.models import tiny
from tests.training_loop import train_steps

PICKED = {1: [5, 0], 2: [3]}


def save_base(folder: Path, family: str = "qwen3_moe", seed: int = 0, **options: Any) -> Path:
    """Save a tiny random bf16 model; `options` are those of `save_pretrained`."""
    tiny(family, seed=seed).to(torch.bfloat16).save_pretrained(folder, **options)
    return folder


def load(folder: Path) -> Any:
    """Load by plain transformers, the parameters cloned out of the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def train_delta(base: Path, folder: Path, experts: dict[int, list[int]] = PICKED) -> Any:
    """Train a few steps and write the delta; return the trained model in the base's dtype."""
    model = attach(load(base), Selection(experts=experts))
    train_steps(model, 3)
    folder.mkdir(parents=True)
    write_delta(
        folder,
        fingerprint(open_checkpoint(base)),
        expert_changes(model),
        {"method": "esft", "base": {"name": "tiny"}},
    )
    return detach(model).eval()


CONFIG, WEIGHTS, BASE = "esft_config.json", "esft_delta.safetensors", "esft_base.json"
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def raw(tensor: Tensor) -> bytes:
    """Return a tensor's bytes as safetensors stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def forge(
    delta: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> Path:
    """Write a delta as a forger would: changed, with all hashes right.

    Args:
        delta: a delta in one file.
        out: a new folder.
        change: changes the tensors and the manifest, in place. What the manifest says of a
            tensor is brought into line first, so that the manifest has the last word.
    """
    shutil.copytree(delta, out)
    manifest = json.loads((out / CONFIG).read_text())
    before, tensors = load_file(out / WEIGHTS), load_file(out / WEIGHTS)
    change(tensors, copy.deepcopy(manifest))
    listed = manifest["tensors"]
    for name, tensor in tensors.items():
        item = listed.setdefault(name, {"base_sha256": "00"})
        item |= {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        item["sha256"] = hashlib.sha256(raw(tensor)).hexdigest()
    for name in before.keys() - tensors.keys():
        del listed[name]
    change(before, manifest)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / CONFIG).write_text(json.dumps(manifest))
    return out


def as_version_1(delta: Path, out: Path) -> Path:
    """Write a delta as version 1 did."""
    manifest = json.loads((delta / CONFIG).read_text())
    out.mkdir()
    save_file(load_file(delta / WEIGHTS), out / "delta.safetensors", metadata={"format": "pt"})
    base = json.loads((delta / BASE).read_text())["tensors"]
    (out / "base.json").write_text(json.dumps({"format": "esft-base/1", "tensors": base}))
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    old = {
        "format": "esft-delta/1",
        "method": manifest["method"],
        "base": {"name": "tiny", "tensors": len(base)},
        "training": {"steps": 3, "recipe": {"model": "tiny"}},
        "rows": {name: t["rows"] for name, t in manifest["tensors"].items() if "rows" in t},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    (out / "delta.json").write_text(json.dumps(old))
    return out

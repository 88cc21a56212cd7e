"""Small checkpoints and deltas for tests, made without `esft.train`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from esft.delta import expert_changes, write_delta
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


def forge(
    delta: Path,
    out: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
    weights: str = "delta.safetensors",
) -> Path:
    """Write a delta as a forger would: changed, with all hashes right.

    Args:
        delta: a delta.
        out: a new folder.
        change: changes the tensors and the manifest, in place.
        weights: the file that holds the tensors.
    """
    out.mkdir()
    for path in delta.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / weights)
    manifest = json.loads((out / "delta.json").read_text())
    change(tensors, manifest)
    save_file(tensors, out / weights, metadata={"format": "pt"})
    data = (out / weights).read_bytes()
    manifest["files"][weights] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (out / "delta.json").write_text(json.dumps(manifest))
    return out

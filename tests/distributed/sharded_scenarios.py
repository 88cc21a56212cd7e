"""Runs of `esft.train` under FSDP2 in several processes; see tests/distributed/test_sharded.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import esft
from esft import processes
from esft.errors import EsftError
from esft.run import ending
from esft.run.sharding import reshard
from tests.distributed.splits import split
from tests.resumed_runs import cut_back, delta_bytes, logged

SHARDED: dict[str, dict[str, Any]] = {
    "plain": {"batch": 2, "evaluated": True, "routing_drift": True},
    "accumulated": {"batch": 1, "accumulated": 2},
    "packed": {"batch": 2, "packing": True},
    "recomputed": {"batch": 2, "gradient_checkpointing": True},
    "bfloat16": {"batch": 2, "dtype": "bfloat16"},
    "full": {"batch": 2, "method": "full", "learning_rate": 1e-3},
    "hot-lora": {"batch": 2, "method": "hot-lora"},
    "lora": {"batch": 2, "method": "lora"},
    "sgd": {"batch": 2, "optim": "sgd"},
    "rmsprop": {"batch": 2, "optim": "rmsprop", "learning_rate": 1e-3},
}
REFUSED: dict[str, dict[str, Any]] = {
    "adafactor": {"batch": 2, "optim": "adafactor"},
    "quantised": {"batch": 2, "frozen_dtype": "int8"},
}


@contextmanager
def _watched(found: dict[str, Any]) -> Iterator[None]:
    """Note what this process keeps of a model when its run ends."""
    whole_weights = ending.whole_weights

    def looked_at(model: nn.Module) -> Any:
        reshard(model)
        parameters = list(model.parameters())
        found["sharded"] = all(isinstance(p, DTensor) for p in parameters)
        kept = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        found["kept"] = kept / sum(p.numel() for p in parameters)
        return whole_weights(model)

    ending.whole_weights = looked_at
    try:
        yield
    finally:
        ending.whole_weights = whole_weights


def curves(folder: Path) -> dict[str, Any]:
    found = {}
    for name, options in SHARDED.items():
        own: dict[str, Any] = {}
        with _watched(own):
            result = esft.train(split(folder.parent, options), folder / name)
        told = result.to_dict()
        kept = ("train_loss", "moved", "drift", "evaluation", "trained", "total", "routed")
        found[name] = own | {key: told[key] for key in kept}
    return found


def resumes_to_the_same_bits(folder: Path) -> dict[str, Any]:
    wanted = split(
        folder.parent, {"batch": 2, "neftune_noise_alpha": 1.0, "save_strategy": "steps"}
    )
    wanted["checkpoints"] = {"keep_last": 9}
    esft.train(wanted, folder / "whole")
    if processes.is_main():
        shutil.copytree(folder / "whole", folder / "cut")
        cut_back(folder / "cut", 6)
    dist.barrier()
    esft.train(wanted, folder / "cut", resume=True)
    return {
        "same": delta_bytes(folder / "cut") == delta_bytes(folder / "whole"),
        "logged": logged(folder / "cut") == logged(folder / "whole"),
    }


def saves_for_one_process(folder: Path) -> None:
    wanted = split(folder.parent, {"batch": 2, "save_strategy": "steps"})
    esft.train(wanted | {"checkpoints": {"keep_last": 9}}, folder / "run")


def refusals(folder: Path) -> dict[str, str]:
    found = {}
    for name, options in REFUSED.items():
        try:
            esft.train(split(folder.parent, options), folder / name)
        except EsftError as error:
            found[name] = str(error)
        dist.barrier()
    return found

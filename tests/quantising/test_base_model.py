"""A run's base in memory: what is checked and told, and how much is there while it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from esft.methods import make_method
from esft.recipe import make_recipe
from esft.run.base_model import BaseModel
from esft.selection import Selection
from tests.deltas import PICKED, save_base


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def base_model(folder: Path, notes: Notes, checked: list[Any], **keys: Any) -> tuple[Any, Any]:
    recipe = make_recipe({"model": str(folder), "data": {"train": "t"}, **keys})
    reporter: Any = notes
    base = BaseModel(recipe, folder, device="cpu", check=checked.append, reporter=reporter)
    return base, make_method(recipe, Selection(experts=PICKED))


def test_the_model_is_checked_once_when_it_can_run(tmp_path: Path) -> None:
    save_base(tmp_path)
    notes, checked = Notes(), list[Any]()
    base, method = base_model(tmp_path, notes, checked, frozen_dtype="nf4", dtype="checkpoint")
    model = base.to_train(method)
    assert checked == []  # its experts are not there yet
    prepared = method.prepare(model)
    base.prepared(prepared)
    assert checked == [prepared]
    (note,) = notes.lines
    assert note.startswith("frozen_dtype: ")
    assert " of frozen weights take " in note


def test_as_loaded_nothing_is_told(tmp_path: Path) -> None:
    save_base(tmp_path)
    notes, checked = Notes(), list[Any]()
    base, method = base_model(tmp_path, notes, checked)
    assert base.to_train(method) is base.exact()
    base.prepared(method.prepare(base.exact()))
    assert len(checked) == 1
    assert notes.lines == []


def test_stored_bits_are_not_sent_to_other_processes_each_step(tmp_path: Path) -> None:
    save_base(tmp_path)
    base, method = base_model(tmp_path, Notes(), [], frozen_dtype="nf4", dtype="checkpoint")
    model = method.prepare(base.to_train(method))
    base.prepared(model)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sent = DistributedDataParallel(model).modules_buffers
    finally:
        distributed.destroy_process_group()
    stored = {b.data_ptr() for b in model.buffers() if b.dtype == torch.uint8}
    assert stored
    assert not stored & {buffer.data_ptr() for buffer in sent}


_LOAD = """
import sys, torch
from pathlib import Path
import esft
from esft.quantising.checkpoint import load_quantised
from esft.selection import Selection
from esft.trained_parts import TrainedParts
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
kinds = {"experts": "nf4", "linear": "nf4"}
model = load_quantised(Path(sys.argv[1]), kinds, TrainedParts(), dtype="checkpoint")
esft.attach(model, Selection(experts={0: [1]}))
print(peak() - before)
"""


@pytest.mark.slow
def test_while_loading_there_is_never_the_whole_model(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, layer_bytes = 8, 32 * 3 * 256 * 512 * 2
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=512,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=256,
        num_experts=32,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    took = int(
        subprocess.run(
            [sys.executable, "-c", _LOAD, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    quantised = layers * layer_bytes * 4.25 / 16
    whole = layers * layer_bytes
    assert quantised + 2 * layer_bytes < 0.6 * whole
    assert quantised < took < quantised + 2 * layer_bytes

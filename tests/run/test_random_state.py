"""Every generator goes on where it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from esft.run.random_state import random_state, restore_random_state
from esft.run.state_tree import pack, unpack


def drawn() -> list[float]:
    return [
        random.gauss(0, 1),  # keeps a second number for later
        random.random(),
        float(np.random.standard_normal()),  # as well
        float(np.random.random()),
        float(torch.randn(())),
        float(torch.rand(())),
    ]


def test_the_same_numbers_are_drawn_again(tmp_path: Path) -> None:
    drawn()
    tree, tensors = pack(random_state(), "random")
    expected = [drawn(), drawn()]
    save_file(tensors, tmp_path / "tensors")
    restore_random_state(unpack(json.loads(json.dumps(tree)), load_file(tmp_path / "tensors")))
    assert [drawn(), drawn()] == expected
    assert drawn() not in expected

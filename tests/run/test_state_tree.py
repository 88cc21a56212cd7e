"""Nested state survives JSON and safetensors to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import EsftError
from esft.run.state_tree import digest, pack, unpack


def through_files(value: Any, folder: Path) -> Any:
    tree, tensors = pack(value, "state")
    save_file(tensors or {"none": torch.zeros(1)}, folder / "tensors")
    return unpack(json.loads(json.dumps(tree)), load_file(folder / "tensors"))


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    "value",
    [
        {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "betas": (0.9, 0.999), "lr": 1e-5},
        [None, True, 1, 0.1, math.inf, -math.inf, math.nan, "text", [], (), {}],
        {"$tensor": "a name that looks like a mark"},
        {"a/b": {"c": torch.zeros(0)}, "a": {"b/c": (torch.ones(2, 3),)}},
        torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.uint8).reshape(2, 3).T,
        (np.arange(4, dtype=np.uint32), np.array([0.5])),
    ],
)
def test_what_comes_back_is_what_went_in(value: Any, tmp_path: Path) -> None:
    assert_same(through_files(value, tmp_path), value)


def test_what_it_cannot_hold_is_named() -> None:
    with pytest.raises(EsftError, match="optimizer/groups/1/hook: a checkpoint cannot hold a set"):
        pack({"groups": [1, {"hook": {1, 2}}]}, "optimizer")


def test_a_digest_is_of_bytes_dtype_and_shape() -> None:
    tensor = torch.tensor([[1.0, -0.0], [2.0, 3.0]])
    assert digest(tensor) == digest(tensor.clone().T.contiguous().T)
    others = [
        tensor.reshape(4),
        tensor.double(),
        tensor.T,
        torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
        tensor.view(torch.int32),
    ]
    assert len({digest(other) for other in [tensor, *others]}) == 6
    assert digest(torch.tensor(1.0)) != digest(torch.tensor([1.0]))


@pytest.mark.parametrize("steps", [0, 5])
def test_a_gradient_scaler_goes_on(tmp_path: Path, steps: int) -> None:
    """Its scale has grown and it is part of the way to the next growth."""

    def made() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def use(scaler: torch.amp.GradScaler, times: int) -> list[float]:
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        scales = []
        for _ in range(times):
            scaler.scale((parameter**2).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    scaler = made()
    use(scaler, steps)
    restored = made()
    restored.load_state_dict(through_files(scaler.state_dict(), tmp_path))
    assert restored.state_dict() == scaler.state_dict()
    assert use(restored, 7) == use(scaler, 7)


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    table = torch.arange(3.0)
    packed, tensors = pack({"one": table, "two": table, "part": table[1:]}, "n")
    save_file(tensors, tmp_path / "t.safetensors")  # refuses those that share
    found = unpack(packed, load_file(tmp_path / "t.safetensors"))
    assert [found[key].tolist() for key in ("one", "two", "part")] == [[0, 1, 2], [0, 1, 2], [1, 2]]

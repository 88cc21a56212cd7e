"""What optimizers keep, against what the real ones hold after a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from esft.plans.optimizers import make_optimizer, optimizer_name, state_bytes
from esft.run.fields import BITSANDBYTES, OPTIMIZERS

SHAPES = [torch.Size(shape) for shape in ((3, 40, 50), (70, 20), (300,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_the_optimizer_holds(name: str, dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = make_optimizer(name, parameters)
    assert optimizer is not None
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    assert state_bytes(name, SHAPES, dtype.itemsize) == held


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_each_optimizer_of_bitsandbytes_is_known(name: str) -> None:
    assert make_optimizer(name, []) is None
    kept = 3 if "ademamix" in name else 2 if "adamw" in name else 1
    big, small = torch.Size((64, 256)), torch.Size((64,))
    wide = kept * 4 * big.numel()
    if "8bit" not in name:
        assert state_bytes(name, [big], 2) == wide
        return
    # One byte a number and a scale in fp32 for each 256 of them.
    assert state_bytes(name, [big], 4) == kept * (big.numel() + 4 * big.numel() // 256)
    assert state_bytes(name, [small], 4) == kept * 4 * small.numel()


def test_a_silent_recipe_gets_what_trainer_takes() -> None:
    assert optimizer_name({}) == TrainingArguments(output_dir="x", use_cpu=True).optim.value
    assert optimizer_name({"optim": "sgd"}) == "sgd"

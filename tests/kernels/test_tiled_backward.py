"""The Triton path's backward: what it skips, what it keeps, and in which dtype it adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from esft_kernels import naive, tiled
from expert_layers import direction, each_tensor, error, exact, inputs, leaves, run, whole_numbers
from guarded_memory import is_poison
from tiled_layers import HIDDEN, INNER, layer, tokens
from torch import Tensor

NAMES = ("x", "gate", "up", "down", "up_bias", "down_bias")
WANTED = [*((name,) for name in NAMES[:4]), ("x", "gate"), ("gate", "down"), ("up", "down")]
WANTED_WITH_BIASES = [*WANTED, *((name,) for name in NAMES[4:]), ("x", "up_bias"), NAMES[4:]]


@pytest.mark.parametrize(
    ("style", "wanted"),
    [
        *(("swiglu", wanted) for wanted in WANTED),
        *(("any function with biases", wanted) for wanted in WANTED_WITH_BIASES),
    ],
)
def test_any_input_may_be_frozen(style, wanted, guarded):
    """Where nothing flows on, the frozen experts' rows are left alone in the backward."""
    bank = layer([5, 0], style)
    x, index, weight = tokens(15)
    tensors = dict(zip(NAMES, [x, weight, *leaves(bank)], strict=False))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in wanted)
    _, expected = run(naive.moe_mlp, *exact([x, index, weight], bank))
    out = tiled.moe_mlp(x, index, weight, bank)
    before = len(guarded.lent())
    found = torch.autograd.grad(out, [tensors[name] for name in wanted], direction(out))
    # `run` orders the gradients as NAMES does.
    for grad, expected_grad in zip(found, expected, strict=True):
        assert expected_grad.norm() > 0
        assert error(grad, expected_grad) < 1e-5
    rows = index.numel()
    selected_rows = int(((index == 5) | (index == 0)).sum())
    products = [t for t in guarded.lent()[before:] if t.numel() in (rows * INNER, rows * 2 * INNER)]
    written = [int((~is_poison(t.view(rows, -1))).any(dim=1).sum()) for t in products]
    flows = "x" in wanted or "gate" in wanted
    assert max(written) == (rows if flows else selected_rows)
    input_grads = [t for t in guarded.lent()[before:] if t.numel() == rows * HIDDEN]
    assert len(input_grads) == ("x" in wanted)


@pytest.mark.parametrize("style", ["swiglu", "any function with biases", "no gate"])
@pytest.mark.parametrize("selected", [[], [1, 2]])
def test_saves_x_and_z_and_the_gates(style, selected):
    """The budget of design.md; without an expert that trains, not even x."""
    bank = layer(selected, style)
    for leaf in leaves(bank):
        leaf.requires_grad_(bool(selected))  # as `esft.experts` has it
    x, index, weight = tokens(15)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tiled.moe_mlp(x, index, weight, bank)
    z = index.numel() * bank.up.out_features
    expected = z + weight.numel() + (x.numel() if selected else 0)
    assert sum(tensor.numel() for tensor in saved) == expected


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_two_runs_give_the_same_bits(style, guarded):
    def once() -> list[Tensor]:
        how = {"dtype": torch.bfloat16, "param_dtype": torch.float32, "hidden": 17}
        args = inputs(15, 1, torch.bfloat16, hidden=17)
        out, grads = run(tiled.moe_mlp, args, layer([5, 0], style, **how))
        return [out, *grads]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_gradients_of_an_fp32_bank_are_not_rounded_to_bf16():
    """Whole numbers in bf16 whose sums need more digits than bf16 has."""

    def gradients(function: Any, dtype: torch.dtype, param_dtype: torch.dtype) -> list[Tensor]:
        (x, index, weight), bank, d_out = whole_numbers(16, dtype, dtype)
        banks = [
            replace(
                p,
                trainable=p.trainable.to(param_dtype).requires_grad_(),
                trainable_bias=p.trainable_bias.to(param_dtype).requires_grad_(),
            )
            for p in (bank.up, bank.down)
        ]
        bank = replace(bank, up=banks[0], down=banks[1])
        out = function(5 * x, index, torch.ones_like(weight), bank)
        return list(torch.autograd.grad(out, leaves(bank), 5 * d_out))

    found = gradients(tiled.moe_mlp, torch.bfloat16, torch.float32)
    expected = gradients(naive.moe_mlp, torch.float64, torch.float64)
    for exact_grad in expected[:2]:
        assert (exact_grad.bfloat16() != exact_grad).any()  # otherwise this test shows nothing
    for grad, exact_grad in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad.double(), exact_grad)


def test_a_gate_s_gradient_is_summed_in_fp32():
    """bf16 holds the products of these whole numbers; nothing cancels, so not their sum."""

    def positive(dtype: torch.dtype, gate_dtype: torch.dtype) -> tuple[Any, Any, Tensor]:
        (x, index, weight), bank, d_out = whole_numbers(16, dtype, gate_dtype)
        few = torch.where(torch.arange(x.shape[1]) < 4, x.abs(), 0)
        return [few, index, weight], each_tensor(bank, Tensor.abs), d_out.abs()

    narrow, bank, d_out = positive(torch.bfloat16, torch.float32)
    wide, wide_bank, wide_d_out = positive(torch.float64, torch.float64)
    (found,) = torch.autograd.grad(tiled.moe_mlp(*narrow, bank), narrow[2], d_out)
    (expected,) = torch.autograd.grad(naive.moe_mlp(*wide, wide_bank), wide[2], wide_d_out)
    assert found.dtype == torch.float32
    assert (expected.bfloat16() != expected).any()  # otherwise this test shows nothing
    assert torch.equal(found.double(), expected)

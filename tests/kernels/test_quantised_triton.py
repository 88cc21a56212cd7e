"""Quantised frozen weights on the Triton path, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from esft_kernels import chunks, naive, tiled
from esft_kernels.bank import ExpertBank
from esft_kernels.path import obstacle
from esft_kernels.quantised import KINDS, Quantised, quantise
from esft_kernels.quantised.triton import dequantise
from expert_layers import E, error, exact, inputs, make_bank, run
from guarded_memory import GuardedMemory, is_poison
from stored_layers import weights_of, with_stored
from tiled_layers import layer, tokens
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENDS = torch.tensor([0, 4, 4, 9, 10, 10, 10], dtype=torch.int32)
"""Where the rows of six experts end, after a first of which nothing is asked."""


def fenced(stored: Quantised, memory: GuardedMemory) -> Quantised:
    return stored.each(memory.fence)


def weight(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "block", "dtype"),
    [(70, 130, 64, FP32), (3, 9, 8, FP32), (65, 64, 24, FP16), (6, 70, 64, BF16)],
)
def test_writes_the_weights_of_experts_with_rows(kind, rows, columns, block, dtype, guarded):
    stored = fenced(quantise(weight(5, rows, columns), kind, block, dtype=dtype), guarded)
    out = torch.empty(5, rows, columns, dtype=dtype)
    dequantise(stored, ENDS[1:], out)
    expected = weights_of(stored)
    for expert, has_rows in enumerate([False, True, True, False, False]):
        if not has_rows:
            assert is_poison(out[expert]).all()
        elif dtype == BF16:  # which the interpreter truncates to
            assert ((out[expert] - expected[expert]).abs() <= expected[expert].abs() / 128).all()
        else:
            assert torch.equal(out[expert], expected[expert].to(dtype))


def test_experts_may_be_cut_out_of_a_bank(guarded):
    stored = fenced(quantise(weight(5, 6, 40), "nf4"), guarded)
    out = torch.empty(3, 6, 40)
    dequantise(stored[1:4], torch.tensor([0, 1, 2, 3], dtype=torch.int32), out)
    assert torch.equal(out, weights_of(stored)[1:4])


def test_no_experts():
    dequantise(quantise(weight(0, 6, 40), "nf4"), torch.zeros(1), torch.empty(0, 6, 40))


def assert_matches_oracle(
    bank: ExpertBank, dense: ExpertBank, args: list[Tensor], bound: float = 1e-5
) -> None:
    out, grads = run(tiled.moe_mlp, args, bank)
    expected, expected_grads = run(naive.moe_mlp, *exact(args, dense))
    assert out.dtype == args[0].dtype
    assert error(out, expected) < bound
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < bound


@pytest.mark.parametrize(
    ("style", "selected"),
    [
        ("swiglu", [2, 0, 1, 5, 4, 3]),
        ("swiglu interleaved", [5, 0]),
        ("swiglu transposed", []),
        ("any function transposed with biases", [5, 0]),
    ],
)
def test_matches_oracle(style, selected, guarded):
    assert_matches_oracle(*with_stored(layer(selected, style), "nf4"), tokens(15))


@pytest.mark.parametrize(("scratch", "selected"), [(1, [5, 0, 1]), (2**12, [5]), (6000, [])])
@pytest.mark.parametrize("style", ["swiglu transposed", "any function with biases"])
def test_chunks_of_experts(scratch, selected, style, monkeypatch, guarded):
    """One frozen expert a launch; two, and a last one alone; three. Or more of the smaller ones."""
    monkeypatch.setitem(chunks.SCRATCH_BYTES, "cpu", scratch)
    bank = layer(selected, style, hidden=16, inner=14)
    assert_matches_oracle(*with_stored(bank, "int8"), inputs(1, 4, FP32, hidden=16))


@pytest.mark.parametrize(("kind", "dtype", "bound"), [("nf4", BF16, 2e-2), ("int3", FP16, 2e-3)])
def test_matches_oracle_in_16_bits(kind, dtype, bound, guarded):
    bank = layer([5, 0], dtype=dtype, param_dtype=FP32)
    assert_matches_oracle(*with_stored(bank, kind), tokens(15, 2, dtype), bound)


def test_rows_of_experts_held_elsewhere_count_for_nothing(guarded):
    x, index, gates = tokens(15)
    index = index.clone()
    index[::2, 0], index[1::3, 1] = -1, E
    assert_matches_oracle(*with_stored(layer([5, 0]), "int4"), [x, index, gates])


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_without_a_gradient_to_pass_on_nothing_is_dequantised_for_it(style, monkeypatch):
    """As in the first trained layer: the frozen experts' part of the backward does not run."""
    bank, dense = with_stored(layer([5, 0], style), "nf4")
    args = [arg.detach() for arg in tokens(15)]
    out = tiled.moe_mlp(*args, bank)
    leaves = [bank.up.trainable, bank.down.trainable]
    expected = torch.autograd.grad(naive.moe_mlp(*args, dense).square().sum(), leaves)

    def refuse(*_: object) -> None:
        raise AssertionError("dequantised")

    monkeypatch.setattr("esft_kernels.quantised.triton._dequantise", refuse)
    for grad, expected_grad in zip(
        torch.autograd.grad(out.square().sum(), leaves), expected, strict=True
    ):
        assert error(grad, expected_grad.double()) < 1e-5


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        bank, _ = with_stored(layer([5, 0], dtype=BF16, hidden=16), "nf4")
        results.append(run(tiled.moe_mlp, inputs(2, 2, BF16, hidden=16), bank))
    (first, first_grads), (again, again_grads) = results
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))


def test_saves_what_a_dense_bank_saves():
    stored, dense = with_stored(layer([5, 0]), "nf4")

    def saved(bank: ExpertBank) -> list[torch.Size]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: shapes.append(tensor.shape) or tensor, lambda tensor: tensor
        ):
            tiled.moe_mlp(*tokens(15), bank)
        return shapes

    assert saved(stored) == saved(dense)


def test_serves_a_trainable_bank_without_gaps_only():
    x = torch.empty(4, 16)
    stored, _ = with_stored(make_bank([1, 2], dtype=FP32), "nf4")
    assert obstacle(x, stored) is None
    trainable = stored.up.trainable.detach().transpose(1, 2).contiguous().transpose(1, 2)
    object.__setattr__(stored.up, "trainable", trainable)
    assert "bank.up differ in memory layout" in obstacle(x, stored)

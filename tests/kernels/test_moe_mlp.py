"""`moe_mlp` against the one-expert-at-a-time oracle in float64, and against autograd on it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from esft_kernels import moe_mlp, naive
from expert_layers import E, I, error, inputs, leaves, make_bank, run, whole_numbers
from torch import Tensor


@pytest.mark.parametrize("selected", [[], [3], [5, 0, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_matches_oracle(selected, transposed, bias, dtype, bound):
    reference_bank = make_bank(selected, transposed=transposed, bias=bias)
    reference = run(naive.moe_mlp, inputs(33, 2, torch.float64), reference_bank)
    bank = make_bank(selected, transposed=transposed, bias=bias, dtype=dtype)
    out, grads = run(moe_mlp, inputs(33, 2, dtype), bank)
    assert error(out, reference[0]) < bound
    for grad, expected in zip(grads, reference[1], strict=True):
        assert error(grad, expected) < bound


@pytest.mark.parametrize(
    ("tokens", "k", "only"), [(1, 1, None), (1, E, None), (40, 1, 0), (40, 2, 5), (7, E, None)]
)
def test_odd_routings(tokens, k, only):
    reference = run(naive.moe_mlp, inputs(tokens, k, torch.float64, only), make_bank([0, 3]))
    bank = make_bank([0, 3], dtype=torch.float32)
    out, grads = run(moe_mlp, inputs(tokens, k, torch.float32, only), bank)
    assert error(out, reference[0]) < 1e-5
    for grad, expected in zip(grads, reference[1], strict=True):
        assert error(grad, expected) < 1e-5


def test_inner_size_that_grouped_mm_refuses():
    reference = run(naive.moe_mlp, inputs(20, 2, torch.float64), make_bank([1], inner=5))
    out, grads = run(
        moe_mlp, inputs(20, 2, torch.float32), make_bank([1], inner=5, dtype=torch.float32)
    )
    assert error(out, reference[0]) < 1e-5
    assert all(error(g, r) < 1e-5 for g, r in zip(grads, reference[1], strict=True))


def test_bf16_compute_with_fp32_parameters():
    reference = run(naive.moe_mlp, inputs(64, 2, torch.float64), make_bank([2, 1]))
    bank = make_bank([2, 1], dtype=torch.bfloat16, param_dtype=torch.float32)
    out, grads = run(moe_mlp, inputs(64, 2, torch.bfloat16), bank)
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads[2:]] == [torch.float32, torch.float32]
    assert error(out, reference[0]) < 2e-2
    assert all(error(g, r) < 2e-2 for g, r in zip(grads, reference[1], strict=True))


def test_gradcheck():
    bank = make_bank([4, 1], bias=True)
    x, index, weight = inputs(5, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: moe_mlp(a, index, b, bank), (x, weight))


def test_two_runs_give_the_same_bits():
    first = run(moe_mlp, inputs(50, 2, torch.float32), make_bank([1, 2], dtype=torch.float32))
    again = run(moe_mlp, inputs(50, 2, torch.float32), make_bank([1, 2], dtype=torch.float32))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("flows", [True, False])
def test_saves_no_frozen_weight_and_no_expert_output(flows):
    """The budget of design.md: x, z and the gates; without a gradient to pass on, z of n rows."""
    bank = make_bank([1, 2], dtype=torch.float32)
    x, index, weight = inputs(50, 2, torch.float32)
    if not flows:
        x, weight = x.detach(), weight.detach()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe_mlp(x, index, weight, bank)
    selected_rows = int(((index == 1) | (index == 2)).sum())
    rows = index.numel() if flows else selected_rows
    assert sum(tensor.numel() for tensor in saved) == x.numel() + weight.numel() + rows * 2 * I


NAMES = ("x", "gate", "up", "down", "up_bias", "down_bias")


@pytest.mark.parametrize(
    "wanted", [*((name,) for name in NAMES), ("x", "gate"), ("gate", "down"), ("x", "up_bias")]
)
def test_any_input_may_be_frozen(wanted):
    """As where only a router trains, or nothing before the first MoE layer."""

    def gradients(function, dtype):
        bank = make_bank([5, 0], bias=True, dtype=dtype)
        x, index, weight = inputs(30, 3, dtype)
        tensors = dict(zip(NAMES, [x, weight, *leaves(bank)], strict=True))
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        out = function(x, index, weight, bank)
        direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * direction).sum().backward()
        return {name: tensor.grad for name, tensor in tensors.items()}

    found = gradients(moe_mlp, torch.float32)
    expected = gradients(naive.moe_mlp, torch.float64)
    assert {name for name, grad in found.items() if grad is not None} == set(wanted)
    for name in wanted:
        assert expected[name].norm() > 0
        assert error(found[name], expected[name]) < 1e-5


def test_experts_outputs_are_summed_in_the_wider_dtype():
    """Six experts a token, gates in fp32: the sum is exact there, and is rounded to bf16 once."""
    narrow, bank, _ = whole_numbers(4, torch.bfloat16, torch.float32)
    exact, wide_bank, _ = whole_numbers(4, torch.float64, torch.float64)
    out = moe_mlp(*narrow, bank)
    expected = naive.moe_mlp(*exact, wide_bank)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.to(torch.bfloat16))


def test_a_gate_s_gradient_is_summed_in_the_gate_s_dtype():
    narrow, bank, d_out = whole_numbers(512, torch.bfloat16, torch.float32)
    exact, wide_bank, wide_d_out = whole_numbers(512, torch.float64, torch.float64)
    (found,) = torch.autograd.grad(moe_mlp(*narrow, bank), narrow[2], d_out)
    (expected,) = torch.autograd.grad(naive.moe_mlp(*exact, wide_bank), exact[2], wide_d_out)
    assert found.dtype == torch.float32
    assert (expected.to(torch.bfloat16) != expected).any()  # otherwise this test shows nothing
    assert torch.equal(found.double(), expected)


def test_a_frozen_bank_without_a_dense_dimension():
    bank = make_bank([1, 2], dtype=torch.float32)
    reference = run(moe_mlp, inputs(20, 2, torch.float32), bank)
    frozen = bank.up.frozen[..., None].repeat(1, 1, 1, 4)[..., 0]  # 16 bytes between numbers
    strided = replace(bank, up=replace(bank.up, frozen=frozen))
    out, grads = run(moe_mlp, inputs(20, 2, torch.float32), strided)
    assert error(out, reference[0].double()) < 1e-6
    assert all(error(g, r.double()) < 1e-6 for g, r in zip(grads, reference[1], strict=True))


@pytest.mark.parametrize("path", ["grouped", "triton"])
def test_ids_may_share_a_slot_and_slots_may_have_no_id(path, monkeypatch):
    """As where one batch mixes several versions of an expert: nine ids for the six slots."""
    monkeypatch.setenv("ESFT_KERNELS", path)
    slot = torch.tensor([5, 0, 4, 5, 1, 2, 2, 0, 5])  # nobody has slot 3
    bank = replace(make_bank([1, 2], dtype=torch.float32), slot=slot)
    reference_bank = replace(make_bank([1, 2]), slot=slot)
    x, _, weight = inputs(20, 3, torch.float32)
    index = torch.randint(0, 9, (20, 3), generator=torch.Generator().manual_seed(0))
    wide = [x.detach().double().requires_grad_(), index, weight.detach().double().requires_grad_()]
    reference = run(naive.moe_mlp, wide, reference_bank)
    out, grads = run(moe_mlp, [x, index, weight], bank)
    assert error(out, reference[0]) < 1e-5
    assert all(error(g, r) < 1e-5 for g, r in zip(grads, reference[1], strict=True))
    unknown = index + 2  # 9 is an expert held elsewhere, 10 is none
    if path == "grouped":
        with pytest.raises(ValueError, match="expected expert ids 0 to 8"):
            moe_mlp(x, unknown, weight, bank)
    else:
        out = moe_mlp(x, unknown, weight, bank)
        assert torch.equal(out.isnan().any(1), (unknown == 10).any(1))

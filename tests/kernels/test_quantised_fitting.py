"""What `quantise` chooses, against searches of their own in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from esft_kernels.quantised import KINDS, quantise
from esft_kernels.quantised import quantiser as module
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_layers import BITS, NF4, by_weight, codes_of, weights_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def drawn(*shape: int, seed: int = 0, tails: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if tails:
        normal *= (torch.rand(shape, generator=generator) < 0.03) * 4 + 1
    return normal * 0.02


def relative(stored: Any, weight: Tensor) -> float:
    difference = weights_of(stored).double() - weight.double()
    return float(difference.norm() / weight.double().norm())


def test_int8_takes_the_largest_as_127():
    weight = drawn(20, 200)
    stored = quantise(weight, "int8")
    for first, last in ((0, 64), (64, 128), (128, 192), (192, 200)):
        scale = (weight[:, first:last].abs().amax(1) / 127).bfloat16()
        assert torch.equal(stored.scale[:, first // 64], scale)
        nearest = np.rint(weight[:, first:last].numpy() / scale.float().numpy()[:, None])
        assert (codes_of(stored)[:, first:last] == nearest.clip(-127, 127)).all()


def test_nf4_takes_the_nearest_value():
    weight = drawn(20, 200)
    stored = quantise(weight, "nf4")
    assert torch.equal(stored.scale[:, 0], weight[:, :64].abs().amax(1).bfloat16())
    assert torch.equal(stored.scale[:, 3], weight[:, 192:].abs().amax(1).bfloat16())
    parts = weight.double().numpy() / by_weight(stored.scale, stored).astype(np.float64)
    distance = np.abs(parts[..., None] - NF4.astype(np.float64))
    chosen = np.take_along_axis(distance, codes_of(stored)[..., None], -1)[..., 0]
    assert (chosen <= distance.min(-1) + 1e-7).all()


def test_nf4_in_the_middle_takes_the_lower():
    """As bitsandbytes compares: `x > middle` is the upper one."""
    middles = (NF4[1:] + NF4[:-1]) / 2
    weight = torch.from_numpy(np.concatenate([middles, [1]]).astype(np.float32))[None]
    assert codes_of(quantise(weight, "nf4", block=16)).tolist() == [[*range(15), 15]]
    above = torch.nextafter(weight, torch.tensor(2.0))
    above[0, -1] = 1
    assert codes_of(quantise(above, "nf4", block=16)).tolist() == [[*range(1, 16), 15]]


@pytest.mark.parametrize(("kind", "gain"), [("int4", 0.93), ("int3", 0.84), ("int2", 0.57)])
@pytest.mark.parametrize("tails", [False, True])
def test_search_is_near_the_best_there_is(kind, gain, tails):
    """Against every range of a fine grid in float64, and against the whole range alone."""
    weight = drawn(200, 64, tails=tails)
    top = 2 ** BITS[kind] - 1
    w = weight.double()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    best = torch.full((200,), torch.inf, dtype=torch.float64)
    plain = None
    for from_low in torch.linspace(0, 0.5, 26):
        for from_high in torch.linspace(0, 0.5, 26):
            start, end = low + from_low * (high - low), high - from_high * (high - low)
            scale = ((end - start) / top).clamp_min(1e-30)
            values = start + scale * ((w - start) / scale).round().clamp(0, top)
            error = (values - w).square().sum(1)
            plain = error if plain is None else plain
            best = torch.minimum(best, error)
    found = (weights_of(quantise(weight, kind)).double() - w).square().sum(1)
    assert best.sum() < found.sum() < 1.08 * best.sum()
    assert found.sum() < gain * plain.sum()
    assert (found < 1.02 * plain + 1e-12).all()  # 2 %: scales are rounded to bf16


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("int8", 0.0065), ("nf4", 0.095), ("int4", 0.088), ("int3", 0.175), ("int2", 0.335)],
)
def test_error_of_normal_weights(kind, bound):
    weight = drawn(64, 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = relative(quantise(weight.to(dtype), kind), weight)
        assert bound * 0.9 < found < bound


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_quantising_what_was_quantised_changes_nothing(kind, data):
    columns, block = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([8, 16, 64]))
    scale = data.draw(st.sampled_from([1e-30, 1e-6, 0.02, 3.0, 1e30]))
    weight = drawn(3, columns, seed=data.draw(st.integers(0, 1000))) * scale
    weight += data.draw(st.sampled_from([0, 0.01, -0.05])) * scale
    once = quantise(weight, kind, block)
    twice = quantise(once.dequantise(), kind, block)
    assert torch.equal(once.dequantise(), twice.dequantise())
    for first, second in zip(once.tensors().values(), twice.tensors().values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "hundredths"),
    [
        ("int3", [1, -2, -3, 0, -1, 0, 0, 0, 0, -2, -2, 0, 0, 3, -2, 1]),
        ("int4", [6, 0, 0, 4, 5, 7, 1, 2, 1, 1, 7, 4, 5, -3, -1, -7]),
        ("int4", [2, 0, 3, -1, 0, -3, -1, -3, 2, 0, 0, -1, 0, 0, 0, -1]),
    ],
)
def test_blocks_whose_best_codes_leave_an_end_unused(kind, hundredths):
    """Their dequantised range is narrower than the codes': the search would find other codes."""
    once = quantise(torch.tensor([hundredths]) * 0.01, kind, 16)
    twice = quantise(once.dequantise(), kind, 16)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.dequantise(), twice.dequantise())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [0.0, 1.0, -0.5, 1e-38, 1e-44, 3e38, -3.4e38])
def test_equal_weights(kind, number):
    """A block without spread; its error is that of rounding to bf16, or of the smallest number."""
    stored = quantise(torch.full((2, 70), number), kind)
    found = weights_of(stored).double()
    assert torch.equal(stored.dequantise().double(), found)
    assert ((found - number).abs() <= abs(number) * 2**-8 + 2e-38).all()
    if number == 0:
        assert (found == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_spoils_its_block_alone(kind):
    weight = drawn(4, 192)
    spoilt = weight.clone()
    spoilt[1, 70] = 100
    once, again = quantise(weight, kind).dequantise(), quantise(spoilt, kind).dequantise()
    same = torch.ones_like(weight, dtype=torch.bool)
    same[1, 64:128] = False
    assert torch.equal(once[same], again[same])
    assert abs(again[1, 70] - 100) < 50


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_gets_the_bits_that_it_gets_alone(kind, monkeypatch):
    weight = drawn(5, 6, 100)
    whole = quantise(weight, kind)
    monkeypatch.setattr(module, "_PIECE", 250)  # two rows at a time, over the experts' borders
    inner = torch.empty(6, 100, 5).copy_(weight.permute(1, 2, 0)).permute(2, 0, 1)
    for other in (quantise(weight, kind), quantise(inner, kind), quantise(weight.double(), kind)):
        for first, second in zip(whole.tensors().values(), other.tensors().values(), strict=True):
            assert torch.equal(first, second)
    alone = quantise(weight[3], kind)
    assert torch.equal(alone.codes, whole.codes[3])
    assert torch.equal(quantise(weight[3, 2], kind).scale, whole.scale[3, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_refuses_what_is_not_finite(kind, bad):
    weight = drawn(3, 4, 70)
    weight[2, 1, 66] = bad
    with pytest.raises(
        ValueError, match=r"weight: expected finite numbers, got .* at \[2, 1, 66\]"
    ):
        quantise(weight, kind)
    with pytest.raises(ValueError, match=r"at \[1, 66\]"):
        quantise(weight[2], kind)
    with pytest.raises(ValueError, match=r"at \[66\]"):
        quantise(weight[2, 1], kind)
    with pytest.raises(ValueError, match=r"at \[1, 2, 66\]"):
        quantise(weight.transpose(0, 1), kind)


@pytest.mark.parametrize(
    ("weight", "kind", "block", "told"),
    [
        (torch.ones(2, 8), "fp4", 64, "kind: expected one of int8, nf4, int4, int3, int2"),
        (torch.ones(2, 8), "nf4", 0, "block: expected a multiple of 8, got 0"),
        (torch.ones(2, 8), "nf4", 20, "block: expected a multiple of 8, got 20"),
        (torch.ones(2, 8, dtype=torch.int8), "nf4", 64, "weight: expected rows of floats"),
        (torch.tensor(1.0), "nf4", 64, "weight: expected rows of floats"),
        (torch.ones(2, 0), "nf4", 64, "shape: expected at least one column"),
        (torch.full((1, 8), 1e300, dtype=torch.float64), "nf4", 64, "expected finite numbers"),
    ],
)
def test_refuses_what_it_cannot_store(weight, kind, block, told):
    with pytest.raises(ValueError, match=told):
        quantise(weight, kind, block)


def test_parameters_and_autograd():
    weight = torch.nn.Parameter(drawn(2, 64))
    stored = quantise(weight, "int4")
    assert not any(tensor.requires_grad for tensor in stored.tensors().values())
    assert not stored.dequantise().requires_grad


def test_dtype_to_compute_in():
    assert quantise(drawn(2, 64).bfloat16(), "nf4").dtype == torch.bfloat16
    stored = quantise(drawn(2, 64), "nf4", dtype=torch.bfloat16)
    assert stored.dequantise().dtype == torch.bfloat16
    assert torch.equal(stored.dequantise(), weights_of(stored).bfloat16())


class Largest(TorchDispatchMode):
    """Remember the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in before:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_no_copy_of_a_bank_in_fp32(kind, contiguous, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 4096)
    bank = drawn(16, 64, 128).bfloat16()
    bank = bank if contiguous else bank.transpose(1, 2)
    with Largest() as seen:
        stored = quantise(bank, kind)
    assert seen.bytes == stored.codes.nbytes < 4 * bank.numel() / 3

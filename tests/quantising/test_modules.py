"""Linear layers and embeddings in few bits compute what their own read weight says, and keep none.

The oracle is an ordinary layer that holds the dequantised weight.
"""

from __future__ import annotations

import copy

import pytest
import torch
from esft_kernels.quantised import quantise
from torch import Tensor, nn

import esft.quantising.linear as linear
from esft.errors import ModelError
from esft.quantising.embedding import QuantisedEmbedding
from esft.quantising.linear import QuantisedLinear

KINDS = ("int8", "nf4")


def pair(
    kind: str, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[QuantisedLinear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(72, 40, bias=bias, dtype=dtype).requires_grad_(False)
    stored = quantise(plain.weight, kind)
    plain.weight.copy_(stored.dequantise())
    return QuantisedLinear(stored, plain.bias), plain


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_ordinary_one_of_its_read_weight(
    kind: str, dtype: torch.dtype, bias: bool
) -> None:
    ours, plain = pair(kind, dtype, bias=bias)
    x, dy = torch.randn(2, 3, 72, dtype=dtype), torch.randn(2, 3, 40, dtype=dtype)
    for mine, its in zip(run(ours, x, dy), run(plain, x, dy), strict=True):
        assert torch.equal(mine, its)
    assert torch.equal(ours.weight, plain.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_is_read_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, plain = pair("nf4", dtype)
    x, dy = torch.randn(5, 72, dtype=dtype), torch.randn(5, 40, dtype=dtype)
    expected = run(plain.double(), x.double(), dy.double())
    read: list[int] = []
    whole = type(ours.stored.value).dequantise

    def dequantise(weight, *given, **named):  # type: ignore[no-untyped-def]
        read.append(weight.shape.numel())
        return whole(weight, *given, **named)

    monkeypatch.setattr(linear, "PIECE", 7 * 72 + 5)
    monkeypatch.setattr(type(ours.stored.value), "dequantise", dequantise)
    for mine, its in zip(run(ours, x, dy), expected, strict=True):
        torch.testing.assert_close(mine.double(), its, **bound(dtype))
    assert sum(read) == 2 * 40 * 72
    assert max(read) == 7 * 72


def bound(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    ours, _ = pair("nf4")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(torch.randn(4, 72, requires_grad=True))
    assert sum(tensor.numel() for tensor in kept) == 0


def test_under_autocast_it_computes_in_autocasts_dtype() -> None:
    ours, plain = pair("int8")
    x = torch.randn(4, 72)
    dy = torch.randn(4, 40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, its = run(ours, x, dy), run(plain, x, dy)
    for own, other in zip(mine, its, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_read_rows(kind: str) -> None:
    weight = torch.randn(50, 24, dtype=torch.bfloat16)
    ours = QuantisedEmbedding(quantise(weight, kind))
    ids = torch.tensor([[3, 49, 3], [0, 1, 48]])
    assert torch.equal(ours(ids), ours.weight[ids])
    assert ours(ids).dtype == torch.bfloat16
    assert (ours.weight - weight).abs().max() <= weight.abs().max() * (0.01, 0.16)[kind == "nf4"]


def test_another_dtype_changes_what_is_computed_in_and_no_stored_bit() -> None:
    ours, _ = pair("nf4")
    before = {name: buffer.clone() for name, buffer in ours.stored.named_buffers()}
    moved = copy.deepcopy(ours).to(torch.float16)  # scales are bf16 themselves
    for name, buffer in moved.stored.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.dtype == before[name].dtype
    assert moved(torch.randn(2, 72, dtype=torch.float16)).dtype == torch.float16
    assert ours.stored.value.dtype == torch.float32
    assert ours.to("meta").stored.value.device.type == "meta"


def test_rounded_weights_are_not_saved_for_the_models() -> None:
    layers = nn.Sequential(pair("int8")[0])
    with pytest.raises(ModelError, match=r"^0\.stored: kept in int8 \(frozen_dtype\), so this"):
        layers.state_dict()

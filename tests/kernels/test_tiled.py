"""The Triton path of the whole layer, in Triton's interpreter, against the oracle in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from esft_kernels import ExpertBank, moe_mlp, naive, tiled
from expert_layers import E, each_tensor, error, exact, leaves, run
from tiled_layers import HIDDEN, STYLES, layer, tokens
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IN_16_BITS = [
    # style, compute, trainable bank, gates, bound
    *((style, BF16, FP32, FP32, 2e-2) for style in STYLES),
    *((style, BF16, BF16, BF16, 2e-2) for style in ("swiglu", "any function with biases")),
    *((style, FP16, FP32, FP32, 2e-3) for style in ("swiglu", "any function with biases")),
]


def assert_matches_oracle(args: list[Tensor], bank: ExpertBank, bound: float = 1e-5) -> None:
    out, grads = run(tiled.moe_mlp, args, bank)
    expected, expected_grads = run(naive.moe_mlp, *exact(args, bank))
    assert out.dtype == args[0].dtype
    assert error(out, expected) < bound
    wanted = [leaf for leaf in (args[0], args[2], *leaves(bank)) if leaf.requires_grad]
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in wanted]
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < bound


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("selected", [[], [5, 0], [2, 0, 1, 5, 4, 3]])
def test_matches_oracle(style, selected, guarded):
    bank = each_tensor(layer(selected, style), guarded.fence)
    x, index, weight = tokens(15)
    assert_matches_oracle([guarded.fence(x), guarded.fence(index), guarded.fence(weight)], bank)


@pytest.mark.parametrize(("style", "dtype", "param_dtype", "gate_dtype", "bound"), IN_16_BITS)
def test_matches_oracle_in_16_bits(style, dtype, param_dtype, gate_dtype, bound, guarded):
    bank = layer([5, 0], style, dtype=dtype, param_dtype=param_dtype)
    x, index, weight = tokens(15, 2, dtype)
    weight = weight.detach().to(gate_dtype).requires_grad_()
    assert_matches_oracle([x, index, weight], bank, bound)


@pytest.mark.parametrize(
    ("count", "k", "only"),
    [(1, 1, None), (1, E, None), (40, 1, 0), (40, 1, 3), (20, 2, 5), (3, E, None)],
)
@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_odd_routings(count, k, only, style, guarded):
    """One token, one expert, all experts; one expert, trainable or not, takes everything."""
    assert_matches_oracle(tokens(count, k, only=only), layer([0, 5], style))


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
@pytest.mark.parametrize("everything", [False, True])
def test_rows_of_experts_held_elsewhere_count_for_nothing(style, everything, guarded):
    x, index, weight = tokens(15)
    index = index.clone()
    index[::2, 0], index[1::3, 1] = -1, E
    if everything:
        index[:] = -1
    with torch.no_grad():
        weight[0, 0] = torch.nan  # not even its weight
    out, grads = run(tiled.moe_mlp, [x, index, weight], layer([5, 0], style))
    with torch.no_grad():
        weight[0, 0] = 1
    expected, expected_grads = run(naive.moe_mlp, *exact([x, index, weight], layer([5, 0], style)))
    assert error(out, expected) < 1e-5
    assert (expected.norm() == 0) == everything
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_an_id_that_names_no_expert_makes_its_token_nan(style, guarded):
    """The GPU is not waited for; all else is as if the row were held elsewhere."""
    x, index, weight = tokens(15)
    wild, index = index.clone(), index.clone()
    wild[2, 1], wild[5, 0], wild[7, 1], wild[11, 0] = -2, E + 1, -(2**40), 2**40
    index[2, 1], index[5, 0], index[7, 1], index[11, 0] = -1, E, -1, E
    bank = layer([5, 0], style)
    out, grads = run(tiled.moe_mlp, [x, wild, weight], bank)
    expected, expected_grads = run(naive.moe_mlp, *exact([x, index, weight], bank))
    bad = (wild != index).any(dim=1)
    assert out[bad].isnan().all()
    assert error(out[~bad], expected[~bad]) < 1e-5
    assert grads[0][bad].isnan().all()
    assert error(grads[0][~bad], expected_grads[0][~bad]) < 1e-5
    for grad, expected_grad in zip(grads[1:], expected_grads[1:], strict=True):
        assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_no_tokens(style, requires_grad):
    """Every gradient is there, as on the other paths: zeros, or nothing to hold."""
    x, index, weight = tokens(4)
    args = [x[:0], index[:0], weight[:0]]
    args = [arg.detach().requires_grad_(arg is not args[1] and requires_grad) for arg in args]
    bank = layer([5, 0], style)
    out = tiled.moe_mlp(*args, bank)
    assert out.shape == (0, HIDDEN)
    for grad in torch.autograd.grad(out.sum(), leaves(bank)):
        assert (grad == 0).all()


def with_gaps(tensor: Tensor) -> Tensor:
    """Return the same numbers, each 12 bytes or more from the next; the gaps hold NaN."""
    if not tensor.is_floating_point():
        return torch.stack([tensor, tensor + 1, tensor - 1], dim=-1)[..., 0]
    wide = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
    wide[..., 1] = tensor.detach()
    return wide[..., 1].requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("style", ["swiglu", "swiglu transposed", "any function with biases"])
def test_inputs_may_have_gaps(style):
    bank = layer([5, 0], style)
    args = tokens(15)
    reference = run(naive.moe_mlp, *exact(args, bank))
    strided = replace(each_tensor(bank, with_gaps), slot=with_gaps(bank.slot))
    out, grads = run(tiled.moe_mlp, [with_gaps(arg) for arg in args], strided)
    assert error(out, reference[0]) < 1e-5
    for grad, expected in zip(grads, reference[1], strict=True):
        assert error(grad, expected) < 1e-5


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_ids_of_one_expert_a_token_may_have_gaps(style):
    """`[:, :1]` of all ids, whose flattened form is a view."""
    x, index, weight = tokens(15)
    args = [x, index[:, :1], weight[:, :1].detach().requires_grad_()]
    assert not args[1].is_contiguous()
    assert_matches_oracle(args, layer([5, 0], style))


@pytest.mark.parametrize("style", ["swiglu", "any function with biases"])
def test_the_output_s_gradient_may_be_expanded(style):
    """As `out.sum()` makes it."""
    bank, args = layer([5, 0], style), tokens(15)
    wide_args, wide_bank = exact(args, bank)
    found = torch.autograd.grad(tiled.moe_mlp(*args, bank).sum(), [args[0], *leaves(bank)])
    expected = torch.autograd.grad(
        naive.moe_mlp(*wide_args, wide_bank).sum(), [wide_args[0], *leaves(wide_bank)]
    )
    for grad, expected_grad in zip(found, expected, strict=True):
        assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_may_be_int32(dtype):
    x, index, weight = tokens(15)
    assert_matches_oracle([x, index.to(dtype), weight], layer([5, 0]))


@pytest.mark.parametrize("style", STYLES)
def test_agrees_with_the_grouped_path(style, monkeypatch):
    def outcome(path: str) -> list[Tensor]:
        monkeypatch.setenv("ESFT_KERNELS", path)
        # x wider than the banks: it is cast to their dtype, and the output to x's.
        x, index, weight = tokens(15, 2, torch.float64)
        out, grads = run(moe_mlp, [x, index, weight], layer([5, 0], style))
        return [out, *grads]

    found, expected = outcome("triton"), outcome("grouped")
    assert found[0].dtype == torch.float64
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs.double()) < 1e-6

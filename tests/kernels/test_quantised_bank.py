"""`moe_mlp` with quantised frozen weights: the same function as with what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from esft_kernels import chunks, grouped, moe_mlp, naive
from esft_kernels.bank import ExpertBank
from esft_kernels.quantised import KINDS, quantise
from esft_kernels.quantised.storage import Quantised
from expert_layers import E, error, exact, inputs, leaves, make_bank, run
from peak_memory import peak_bytes
from stored_layers import with_stored
from torch import Tensor

PATHS = ("naive", "grouped")
SCRATCH = {"grouped, one by one": 1, "grouped, some": 1500, "grouped, all": 2**24}
"""Bytes for dequantised experts: two of the up projection's in fp32, say."""


@pytest.fixture(params=["naive", *SCRATCH])
def path(request, monkeypatch) -> str:
    """Choose a path, and how many experts it dequantises at a time."""
    name = request.param
    monkeypatch.setenv("ESFT_KERNELS", name.split(",")[0])
    if name in SCRATCH:
        monkeypatch.setitem(chunks.SCRATCH_BYTES, "cpu", SCRATCH[name])
    return name


def assert_same_function(
    bank: ExpertBank, dense: ExpertBank, args: list[Tensor], bound: float
) -> None:
    out, grads = run(moe_mlp, args, bank)
    expected, expected_grads = run(naive.moe_mlp, *exact(args, dense))
    assert out.dtype == args[0].dtype
    assert error(out, expected) < bound
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < bound


@pytest.mark.parametrize("selected", [[], [3], [5, 0, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matches_oracle(selected, transposed, bias, path):
    bank = make_bank(selected, transposed=transposed, bias=bias, dtype=torch.float32)
    assert_same_function(*with_stored(bank, "nf4"), inputs(33, 2, torch.float32), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, path):
    bank = make_bank([2, 1], dtype=torch.float32)
    assert_same_function(*with_stored(bank, kind), inputs(33, 2, torch.float32), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float16, torch.float32, 2e-3),
    ],
)
def test_other_dtypes(dtype, param_dtype, bound, path):
    bank = make_bank([2, 1], dtype=dtype, param_dtype=param_dtype)
    stored, dense = with_stored(bank, "nf4")
    assert stored.dtype == dtype
    assert_same_function(stored, dense, inputs(33, 2, dtype), bound)


@pytest.mark.parametrize(
    ("tokens", "k", "only"),
    [(1, 1, None), (1, E, None), (40, 1, 0), (40, 2, 5), (7, E, None), (0, 2, None)],
)
def test_odd_routings_and_sizes(tokens, k, only, path):
    for hidden, inner in ((16, 8), (13, 5)):
        bank = make_bank([0, 3], dtype=torch.float32, hidden=hidden, inner=inner)
        args = inputs(tokens, k, torch.float32, only, hidden)
        assert_same_function(*with_stored(bank, "int3", 8), args, 1e-5)


def test_only_experts_with_rows_are_dequantised(monkeypatch):
    """Experts 1 and 5 of the frozen 1, 2, 4, 5: two runs, in each projection and pass."""
    seen: list[tuple[int, ...]] = []
    usual = Quantised.dequantise

    def note(self: Quantised, *args, **kwargs) -> Tensor:
        seen.append(tuple(self.scale[:, 0, 0].tolist()))
        return usual(self, *args, **kwargs)

    stored, _ = with_stored(make_bank([0, 3], dtype=torch.float32), "nf4")
    x, _, weight = inputs(4, 3, torch.float32)
    index = torch.tensor([[1, 0, 3], [1, 5, -1], [5, 3, E], [1, 3, 0]])
    monkeypatch.setattr(Quantised, "dequantise", note)
    out = moe_mlp(x, index, weight, stored)
    up, down = (p.frozen.scale[:, 0, 0].tolist() for p in (stored.up, stored.down))
    assert seen == [(up[0],), (up[3],), (down[0],), (down[3],)]
    seen.clear()
    out.sum().backward()
    assert seen == [(down[0],), (down[3],), (up[0],), (up[3],)]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_projection_may_be_dense(kind):
    bank = make_bank([1, 2], dtype=torch.float32)
    stored, dense = with_stored(bank, kind)
    args = inputs(20, 2, torch.float32)
    for name in ("up", "down"):
        mixed = replace(stored, **{name: getattr(bank, name)})
        both = replace(dense, **{name: getattr(bank, name)})
        assert_same_function(mixed, both, args, 1e-5)


def test_gradcheck():
    stored, _ = with_stored(make_bank([4, 1], bias=True), "int4")
    x, index, weight = inputs(5, 2, torch.float64)
    for path in (grouped.moe_mlp, naive.moe_mlp):
        assert torch.autograd.gradcheck(lambda a, b, f=path: f(a, index, b, stored), (x, weight))


def test_two_runs_give_the_same_bits(path):
    results = []
    for _ in range(2):
        stored, _ = with_stored(make_bank([1, 2], dtype=torch.float32), "int2")
        results.append(run(moe_mlp, inputs(50, 2, torch.float32), stored))
    (first, first_grads), (again, again_grads) = results
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))


def test_the_trainable_bank_is_exact():
    """Tokens of selected experts alone: bit for bit what a dense bank gives, and its gradients."""
    bank = make_bank([1, 2], dtype=torch.float32)
    stored, _ = with_stored(bank, "int2")
    args = inputs(40, 1, torch.float32, only=2)
    out, grads = run(moe_mlp, args, stored)
    expected, expected_grads = run(moe_mlp, args, bank)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def large(kind: str) -> tuple[ExpertBank, list[Tensor], int]:
    """Return a layer with far more weights than rows, its input, and an expert's bytes in bf16."""
    bank = make_bank([1], dtype=torch.bfloat16, hidden=256, inner=128)
    frozen = {p: p.frozen.repeat(20, 1, 1) for p in (bank.up, bank.down)}  # 100 experts
    up, down = (replace(p, frozen=quantise(weight, kind)) for p, weight in frozen.items())
    slot = torch.arange(101)
    x, _, weight = inputs(50, 2, torch.bfloat16, hidden=256)
    index = torch.arange(100).view(50, 2) + 1
    return (
        replace(bank, up=up, down=down, slot=slot),
        [x, index, weight],
        2 * 256 * 256,
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [("naive", "nf4"), ("grouped", "nf4"), ("grouped", "int8"), ("grouped", "int3")],
)
def test_nothing_of_the_bank_s_dense_size_is_allocated(path, kind, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", path)
    bank, args, expert = large(kind)
    monkeypatch.setitem(chunks.SCRATCH_BYTES, "cpu", 2 * expert)
    run(moe_mlp, args, bank)  # what is cached is there
    peak = peak_bytes(lambda: run(moe_mlp, args, bank))
    # Two experts, a piece of one in fp32 with its codes, one trainable expert with its gradients,
    # and rows: less than a fifth of the up projection, which has a hundred experts.
    assert peak < 20 * expert


@pytest.mark.parametrize("path", PATHS)
def test_saves_no_dequantised_weight(path, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", path)
    bank, args, expert = large("nf4")
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        moe_mlp(*args, bank)
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves(bank)}
    kept = {t.untyped_storage().data_ptr(): t.nbytes for t in saved}
    assert saved
    assert max(nbytes for at, nbytes in kept.items() if at not in own) < expert


def test_gradients_for_what_trains_alone():
    stored, _ = with_stored(make_bank([1, 2], dtype=torch.float32), "nf4")
    out = moe_mlp(*inputs(20, 2, torch.float32), stored)
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves(stored))
    for projection in (stored.up, stored.down):
        for tensor in projection.frozen.tensors().values():
            assert not tensor.requires_grad
            assert tensor.grad is None


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("down", lambda stored: stored[:3], r"expected \[4, 16, 8\]"),
        (
            "down",
            lambda stored: replace(stored, dtype=torch.bfloat16),
            "expected torch.float32, as",
        ),
        ("up", lambda stored: stored[0], r"expected \[.., out, in\]"),
        ("up", lambda stored: stored.to("meta"), "expected device cpu, as x"),
    ],
)
def test_checks_a_quantised_bank_as_a_dense_one(name, change, told):
    stored, _ = with_stored(make_bank([1, 2], dtype=torch.float32), "nf4")
    projection = getattr(stored, name)
    wrong = replace(stored, **{name: replace(projection, frozen=change(projection.frozen))})
    with pytest.raises(ValueError, match=rf"bank\.{name}\.frozen: {told}"):
        moe_mlp(*inputs(20, 2, torch.float32), wrong)

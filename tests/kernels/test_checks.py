"""Bad input: every argument that no path computes is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from esft_kernels import ExpertBank, Projection, SwiGLU, moe_mlp, naive
from expert_layers import E, H, error, exact, inputs, make_bank, relu2, run
from torch import Tensor

PATHS = ("naive", "grouped", "triton")
INNER = 6
Layer = dict[str, Any]


def layer(**how: Any) -> Layer:
    x, index, weight = inputs(7, 2, torch.float32)
    bank = make_bank([5, 0], dtype=torch.float32, inner=INNER, **how)
    return {"x": x, "topk_index": index, "topk_weight": weight, "bank": bank}


def put(name: str, change: Callable[[Any], Any]) -> Callable[[Layer], Layer]:
    """Return a function that changes one argument, or one tensor of the bank, by its name."""

    def apply(args: Layer) -> Layer:
        first, *rest = name.split(".")
        if not rest:
            return args | {first: change(args[first])}
        bank: ExpertBank = args[first]
        inside = getattr(bank, rest[0])
        if len(rest) == 1:
            return args | {first: replace(bank, **{rest[0]: change(inside)})}
        changed = replace(inside, **{rest[1]: change(getattr(inside, rest[1]))})
        return args | {first: replace(bank, **{rest[0]: changed})}

    return apply


def fewer_rows(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def narrower(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def lower(tensor: Tensor) -> Tensor:
    return tensor[:, :-1]


def both(change: Callable[[Tensor], Tensor]) -> Callable[[Projection], Projection]:
    """Return a function that changes the weights of both banks alike."""
    return lambda p: replace(p, trainable=change(p.trainable), frozen=change(p.frozen))


WEIGHTS = [f"bank.{p}.{bank}" for p in ("up", "down") for bank in ("trainable", "frozen")]
BIASES = [f"{name}_bias" for name in WEIGHTS]
FLOAT = "expected bfloat16, float16, float32 or float64"
Case = tuple[str, Callable[[Any], Any], str]
CASES: list[Case] = [
    ("x", narrower, f"x: expected [T, {H}]; got shape [7, {H - 1}], torch.float32, cpu"),
    ("x", flat, f"x: expected [T, {H}]"),
    ("x", lambda x: x[None], f"x: expected [T, {H}]"),
    ("x", Tensor.int, f"x: {FLOAT}; got shape [7, {H}], torch.int32"),
    ("x", lambda x: x.to(torch.float8_e4m3fn), f"x: {FLOAT}"),
    ("topk_index", fewer_rows, "topk_index: expected [7, K], a row of expert ids for each row"),
    ("topk_index", flat, "topk_index: expected [7, K]"),
    ("topk_index", lambda index: index[:, :0], "topk_index: expected [7, K]"),
    ("topk_index", Tensor.float, "topk_index: expected int64 or int32"),
    ("topk_index", Tensor.bool, "topk_index: expected int64 or int32"),
    ("topk_weight", narrower, "topk_weight: expected [7, 2], as topk_index; got shape [7, 1]"),
    ("topk_weight", flat, "topk_weight: expected [7, 2]"),
    ("topk_weight", Tensor.long, f"topk_weight: {FLOAT}"),
    ("topk_weight", lambda weight: weight.to(torch.complex64), f"topk_weight: {FLOAT}"),
    ("bank.slot", lambda slot: slot[None], "bank.slot: expected [E] int64"),
    ("bank.slot", lambda slot: slot[0], "bank.slot: expected [E] int64"),
    ("bank.slot", lambda slot: slot[:0], "bank.slot: expected [E] int64, with E above 0"),
    ("bank.slot", Tensor.int, "bank.slot: expected [E] int64"),
    ("bank.slot", lambda slot: slot + 1, "bank.slot: expected slots 0 to 5, got ["),
    ("bank.slot", lambda slot: slot - 1, "bank.slot: expected slots 0 to 5, got ["),
    # The up projection's banks say how many experts there are, the frozen banks how wide they
    # are: what does not agree with that is named.
    ("bank.up.trainable", fewer_rows, f"bank.down.trainable: expected [1, {H}, {INNER}]"),
    ("bank.up.frozen", fewer_rows, f"bank.down.frozen: expected [3, {H}, {INNER}]"),
    ("bank.down.trainable", fewer_rows, f"bank.down.trainable: expected [2, {H}, {INNER}]"),
    ("bank.down.frozen", fewer_rows, f"bank.down.frozen: expected [4, {H}, {INNER}]"),
    ("bank.up.trainable", lower, f"bank.up.trainable: expected [2, {2 * INNER}, {H}]"),
    ("bank.up.frozen", lower, f"bank.up.trainable: expected [2, {2 * INNER - 1}, {H}]"),
    ("bank.up.trainable", narrower, f"bank.up.trainable: expected [2, {2 * INNER}, {H}]"),
    ("bank.up.frozen", narrower, f"x: expected [T, {H - 1}]"),
    ("bank.down.trainable", lower, f"bank.down.trainable: expected [2, {H}, {INNER}]"),
    ("bank.down.frozen", narrower, f"bank.down.trainable: expected [2, {H}, {INNER - 1}]"),
    ("bank.up", both(lower), f"bank.up.frozen: expected an output of width {2 * INNER}, twice"),
    ("bank.down", both(lower), f"bank.down.frozen: expected an output of width {H}; got"),
    ("bank.down.frozen", Tensor.bfloat16, "bank.down.frozen: expected torch.float32, as bank.up"),
    *((name, fewer_rows, f"{name}: expected [{2 if 'train' in name else 4}, ") for name in BIASES),
    *((name, narrower, f"{name}: expected [{2 if 'train' in name else 4}, ") for name in BIASES),
    *((name, flat, f"{name}: expected [.., out, in]") for name in WEIGHTS),
    *((name, lambda w: w[0, 0, 0], f"{name}: expected [.., out, in]") for name in WEIGHTS),
    *((name, flat, f"{name}: expected [.., out]; got") for name in BIASES),
    *((name, Tensor.char, f"{name}: {FLOAT}") for name in WEIGHTS + BIASES),
]
"""What is changed, how, and how the message begins."""


@pytest.mark.parametrize(("name", "change", "message"), CASES)
def test_refuses(name, change, message):
    args = layer(bias=True) if "bias" in name else layer(activation=SwiGLU())
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        moe_mlp(**put(name, change)(args))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", [{"bias": True}, {"activation": SwiGLU()}])
def test_accepts_what_the_cases_change(path, how, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", path)
    args = layer(**how)
    assert moe_mlp(**args).shape == args["x"].shape


NAMES = ("topk_index", "topk_weight", "bank.slot", *WEIGHTS, *BIASES)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_another_device(name):
    args = layer(bias=True)
    expected = f"{name}: expected device cpu, as x; got shape"
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(**put(name, lambda tensor: tensor.to("meta"))(args))


@pytest.mark.parametrize("name", ["bank.up", "bank.down"])
@pytest.mark.parametrize("missing", ["trainable_bias", "frozen_bias"])
def test_refuses_a_bias_in_one_bank_alone(name, missing):
    args = put(f"{name}.{missing}", lambda bias: None)(layer(bias=True))
    with pytest.raises(ValueError, match=f"{name}: expected a bias in both banks or in neither"):
        moe_mlp(**args)


@pytest.mark.parametrize("path", ["naive", "grouped"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-2, E + 1, 1000])
def test_refuses_an_id_that_names_no_expert(path, dtype, wrong, monkeypatch):
    """On the Triton path its token becomes NaN: see test_tiled.py."""
    monkeypatch.setenv("ESFT_KERNELS", path)
    args = layer()
    index = args["topk_index"].to(dtype)
    index[3, 1] = wrong
    index[5, 0] = 99  # the first is named
    expected = (
        "topk_index: expected expert ids 0 to 5 (or -1 or 6 for an expert held elsewhere), "
        f"got {wrong} at [3, 1]"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        moe_mlp(**args | {"topk_index": index})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", [None, SwiGLU()])
def test_ids_of_experts_held_elsewhere_count_for_nothing(path, activation, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", path)
    args = layer(activation=activation)
    x, weight, bank = args["x"], args["topk_weight"], args["bank"]
    index = args["topk_index"].clone()
    index[::2, 0], index[1::3, 1] = -1, E
    out, grads = run(moe_mlp, [x, index, weight], bank)
    # The same, without those ids: any expert, with a weight of 0.
    held = (index >= 0) & (index < E)
    (wide_x, _, wide_weight), wide_bank = exact([x, index, weight], bank)
    there = torch.where(held, index, 0)

    def held_only(x: Tensor, index: Tensor, weight: Tensor, bank: ExpertBank) -> Tensor:
        return naive.moe_mlp(x, index, weight * held, bank)

    expected, expected_grads = run(held_only, [wide_x, there, wide_weight], wide_bank)
    assert error(out, expected) < 1e-5
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(lambda z: z, id="as wide as what it was given"),
        pytest.param(lambda z: relu2(z)[:, : INNER - 1], id="too narrow"),
        pytest.param(lambda z: relu2(z)[:, :INNER].double(), id="another dtype"),
        pytest.param(lambda z: relu2(z)[:-1, :INNER], id="a row less"),
    ],
)
def test_refuses_an_activation_that_does_not_fit(path, activation, monkeypatch):
    monkeypatch.setenv("ESFT_KERNELS", path)
    args = layer(activation=activation)
    index = torch.full_like(args["topk_index"], 5)  # so that each expert with rows has the same
    expected = rf"bank.activation: expected a result of shape \[\d+, {INNER}\] in torch.float32"
    with pytest.raises(ValueError, match=expected):
        moe_mlp(**args | {"topk_index": index})


def test_refuses_no_width_of_other_activations():
    """Only SwiGLU ties the up projection's output to the down projection's input."""
    args = layer(gated=False, activation=relu2)
    assert moe_mlp(**args).shape == args["x"].shape
    with pytest.raises(ValueError, match=re.escape("bank.up.frozen: expected an output of width")):
        moe_mlp(**put("bank.activation", lambda _: SwiGLU())(args))

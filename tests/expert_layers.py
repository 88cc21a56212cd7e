"""Layers of random experts, inputs for them, and how far a path's result is from the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from esft_kernels import ExpertBank, Projection
from esft_kernels.bank import frozen_ids, slot_map
from torch import Tensor
from torch.nn import functional as F

E, H, I = 6, 16, 8  # noqa: E741


def swiglu(z: Tensor) -> Tensor:
    """Compute what `SwiGLU()` does, as a function that no path knows."""
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped(z: Tensor) -> Tensor:
    """Halves in turns, as gpt-oss has them."""
    gate, up = z[..., ::2], z[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def relu2(z: Tensor) -> Tensor:
    """Squares what is positive: experts without a gate."""
    return F.relu(z).square()


def make_bank(
    selected: list[int],
    *,
    dtype: torch.dtype = torch.float64,
    transposed: bool = False,
    bias: bool = False,
    hidden: int = H,
    inner: int = I,
    param_dtype: torch.dtype | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    gated: bool = True,
) -> ExpertBank:
    """Draw a bank; with `bias` its halves stand in turns, unless an activation is given."""
    generator = torch.Generator().manual_seed(1)
    rest = frozen_ids(selected, E)

    def projection(rows: int, columns: int) -> Projection:
        shape = (E, columns, rows) if transposed else (E, rows, columns)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) / columns**0.5
        shift = torch.randn((E, rows), generator=generator, dtype=torch.float64) if bias else None
        own = param_dtype or dtype
        return Projection(
            weight[selected].to(own).requires_grad_(),
            weight[rest].to(dtype),
            transposed,
            None if shift is None else shift[selected].to(own).requires_grad_(),
            None if shift is None else shift[rest].to(dtype),
        )

    return ExpertBank(
        up=projection(2 * inner if gated else inner, hidden),
        down=projection(hidden, inner),
        slot=slot_map(selected, E),
        activation=activation or (clamped if bias else swiglu),
    )


def inputs(
    tokens: int, k: int, dtype: torch.dtype, only: int | None = None, hidden: int = H
) -> list[Tensor]:
    """Draw x, the ids of k experts a token, and their weights; `only` is the one expert chosen."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, E, generator=generator, dtype=torch.float64)
    scores[:, 4] = 0  # an expert that nobody chooses, unless K is E
    weight, index = scores.topk(k)
    if only is not None:
        index = torch.full_like(index, only)
    return [x.to(dtype).requires_grad_(), index, weight.to(dtype).requires_grad_()]


def leaves(bank: ExpertBank) -> list[Tensor]:
    """Return what trains: both projections' weights, then their biases."""
    both = (bank.up, bank.down)
    found = [p.trainable for p in both] + [p.trainable_bias for p in both]
    return [tensor for tensor in found if tensor is not None]


def each_tensor(bank: ExpertBank, change: Callable[[Tensor], Tensor]) -> ExpertBank:
    """Return the bank with its weights and biases changed."""

    def projection(p: Projection) -> Projection:
        biases = (p.trainable_bias, p.frozen_bias)
        return Projection(
            change(p.trainable),
            change(p.frozen),
            p.transposed,
            *(None if bias is None else change(bias) for bias in biases),
        )

    return replace(bank, up=projection(bank.up), down=projection(bank.down))


def exact(args: list[Tensor], bank: ExpertBank) -> tuple[list[Tensor], ExpertBank]:
    """Return the same numbers in float64: what is left of them in the bank's dtype.

    A result's distance from this oracle is what the computation loses, not its input.
    """

    def double(tensor: Tensor) -> Tensor:
        rounded = tensor.detach().to(bank.dtype)
        return rounded.double().requires_grad_(tensor.requires_grad)

    x, index, weight = args
    # The weights of the sum are never rounded.
    gates = weight.detach().double().requires_grad_(weight.requires_grad)
    return [double(x), index, gates], each_tensor(bank, double)


def direction(out: Tensor) -> Tensor:
    """Return a gradient for an output, in eighths: every dtype holds it."""
    steps = torch.arange(out.numel(), dtype=torch.float64) * 7 % 17 - 8
    return (steps / 8).to(out.dtype).view_as(out)


def run(
    fn: Callable[..., Tensor], args: list[Tensor], bank: ExpertBank
) -> tuple[Tensor, list[Tensor]]:
    """Return the output and the gradients of x, of the gates and of the leaves that need one."""
    out = fn(*args, bank)
    wanted = [leaf for leaf in (args[0], args[2], *leaves(bank)) if leaf.requires_grad]
    grads = torch.autograd.grad(out, wanted, direction(out), allow_unused=True)
    return out, [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(wanted, grads, strict=True)
    ]


def error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    scale = reference.detach().norm().clamp_min(1e-12)
    return float((value.detach().double() - reference.detach()).norm() / scale)


def whole_numbers(
    inner: int, dtype: torch.dtype, gate_dtype: torch.dtype
) -> tuple[list[Tensor], ExpertBank, Tensor]:
    """Inputs, experts and d_out of small whole numbers: every product of bf16 numbers is exact.

    Gates are multiples of 2^-12, more digits than bf16 has; the activation adds both halves.
    """
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, limit: int = 1) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).to(dtype)

    def projection(rows: int, columns: int, bias: Tensor) -> Projection:
        weight = draw(E, rows, columns)
        return Projection(weight[:2].clone(), weight[2:].clone(), False, bias[:2], bias[2:])

    bank = ExpertBank(
        up=projection(2 * inner, H, draw(E, 2 * inner)),
        # Halves up to 64.5, times d_out, over H columns: exact in 8 bits each, but not their sum.
        down=projection(H, inner, draw(E, H, limit=129) / 2),
        slot=slot_map([0, 1], E),
        activation=lambda z: z[:, : z.shape[1] // 2] + z[:, z.shape[1] // 2 :],
    )
    tokens = 32
    x, d_out = draw(tokens, H), draw(tokens, H)
    index = torch.stack([torch.randperm(E, generator=generator) for _ in range(tokens)])
    weight = torch.randint(1, 4096, (tokens, E), generator=generator) / 4096
    return [x, index, weight.to(gate_dtype).requires_grad_()], bank, d_out

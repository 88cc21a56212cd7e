"""Is the Triton path right on this device? Against one expert at a time in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from baselines import grouped, prefix, stock, stock_forward
from esft_kernels import ExpertBank, Projection, naive, tiled
from gpu_setting import (
    Inputs,
    Scale,
    Shape,
    error,
    inputs,
    make_bank,
    poisoned,
    popularity,
    select,
    trainables,
    weights,
)
from torch import Tensor

RESULTS = ("out", "dx", "d_gates", "d_up", "d_down")
FAR = "an index past 2^31"
# bf16 has 8 bits; Triton's interpreter cuts off where a GPU rounds.
BOUND = {"cuda": 1e-2, "cpu": 2e-2}
TOKENS = {"cuda": 1024, "cpu": 16}
# N x H, N x 2I and the frozen bank each have more than 2^31 elements.
FAR_SHAPE, FAR_TOKENS, FAR_CHUNKS = Shape(2048, 1024, 544, 8), 135_168, 8


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        case: what was computed.
        result: which of its results.
        error: norm of the difference over the norm of the reference; None if it was not run.
        bound: largest error that passes.
        note: why it was not run.
    """

    case: str
    result: str
    error: float | None
    bound: float
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether the error is above the bound, or no number."""
        return self.error is not None and not self.error < self.bound


def checks(device: torch.device, scale: Scale) -> Iterator[Check]:
    """Compare all results of several layers; fresh memory holds NaN while ours computes."""
    bound = BOUND[device.type]
    for model, shape in scale.shapes.items():
        up, down = weights(shape, device)
        for case, batch, selected in _batches(shape, device):
            bank = make_bank(up, down, selected)
            found = _ours(batch, bank)
            expected = results(naive.moe_mlp, _double(batch), _doubled(bank))
            for name, a, b in zip(RESULTS, found, expected, strict=True):
                yield Check(f"{model}, {case}", name, error(a, b), bound)
            if case == "uniform":
                yield from _baselines(model, batch, bank, up, down, expected)
            again = _ours(batch, bank)
            same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            yield Check(f"{model}, {case}", "same bits again", 0.0 if same else 1.0, bound)
    if device.type == "cpu":
        for name in RESULTS:
            yield Check(FAR, name, None, bound, "needs 40 GB and a GPU")
    else:
        for name, far in zip(RESULTS, _far_errors(device), strict=True):
            yield Check(FAR, name, far, bound)


def _baselines(
    model: str, batch: Inputs, bank: ExpertBank, up: Tensor, down: Tensor, expected: list[Tensor]
) -> Iterator[Check]:
    """Compare what ours is compared with, so that nothing is timed that computes something else."""
    layer, own = prefix(up, down, bank.slot, bank.num_selected)
    everything = [w.detach().requires_grad_() for w in (up, down)]
    module = stock(up, down)
    selected = bank.slot.argsort()[: bank.num_selected]
    layers = {
        "grouped_mm prefix dW": (layer(batch.x, batch.index, batch.gates), own),
        "grouped_mm": (grouped(batch.x, batch.index, batch.gates, *everything), everything),
        "transformers": (
            stock_forward(module, batch.x, batch.index, batch.gates),
            list(module.parameters()),
        ),
    }
    for case, (out, trained) in layers.items():
        grads = torch.autograd.grad(out, [batch.x, batch.gates, *trained], batch.d_out)
        dx, d_gates, d_up, d_down = grads
        if len(d_up) > len(selected):
            d_up, d_down = d_up[selected], d_down[selected]
        for name, a, b in zip(
            RESULTS, [out.detach(), dx, d_gates, d_up, d_down], expected, strict=True
        ):
            yield Check(f"{model}, {case}", name, error(a, b), BOUND["cuda"])


def _batches(shape: Shape, device: torch.device) -> Iterator[tuple[str, Inputs, list[int]]]:
    """Yield names of cases with a batch and the experts to train."""
    E, tokens = shape.experts, TOKENS[device.type]
    alike = inputs(shape, tokens, popularity("uniform", E), device)
    yield "uniform", alike, select(alike.index, E, 0.1)
    skewed = inputs(shape, tokens, popularity("skewed", E), device)
    yield "skewed", skewed, select(skewed.index, E, 0.1)
    half = torch.ones(E)
    half[E // 2 :] = 0
    yield "empty experts", inputs(shape, tokens, half, device), [E - 1, 0]
    one = inputs(shape, tokens, torch.ones(E), device)
    yield "one expert has all rows", _with_index(one, torch.full_like(one.index, 1)), [0, 1]
    gone = torch.where(alike.index % 3 == 0, -1, alike.index)
    yield "experts held elsewhere", _with_index(alike, gone), [0, 1]


def _with_index(batch: Inputs, index: Tensor) -> Inputs:
    return Inputs(batch.x, index, batch.gates, batch.d_out)


def _ours(batch: Inputs, bank: ExpertBank) -> list[Tensor]:
    with poisoned():
        return results(tiled.moe_mlp, batch, bank)


def results(layer: Callable[..., Tensor], batch: Inputs, bank: ExpertBank) -> list[Tensor]:
    """Return a layer's results in the order of RESULTS."""
    out = layer(batch.x, batch.index, batch.gates, bank)
    wanted = [batch.x, batch.gates, *trainables(bank)]
    grads = torch.autograd.grad(out, wanted, batch.d_out, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def _double(batch: Inputs) -> Inputs:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    return Inputs(leaf(batch.x), batch.index, leaf(batch.gates), batch.d_out.double())


def _doubled(bank: ExpertBank, dtype: torch.dtype = torch.float64) -> ExpertBank:
    """Return what is computed with, rounded as it is there, in a wider dtype."""

    def wide(p: Projection) -> Projection:
        rounded = p.trainable.detach().to(p.frozen.dtype)
        return Projection(rounded.to(dtype).requires_grad_(), p.frozen)

    return ExpertBank(wide(bank.up), wide(bank.down), bank.slot, bank.activation)


def _far_errors(device: torch.device) -> list[float]:
    """Return the errors of a layer whose tensors have elements past 2^31, in order of RESULTS.

    The reference is in fp32 and takes the tokens in chunks, none of which reaches that far.
    """
    E = FAR_SHAPE.experts
    batch = inputs(FAR_SHAPE, FAR_TOKENS, popularity("uniform", E), device)
    bank = make_bank(*weights(FAR_SHAPE, device), select(batch.index, E, 0.01))
    out, dx, d_gates, *d_bank = _ours(batch, bank)
    oracle = _doubled(bank, torch.float32)
    parts, sums = [], [torch.zeros_like(grad) for grad in d_bank]
    fields = (batch.x, batch.index, batch.gates, batch.d_out)
    for x, index, gates, d_out in zip(*(t.chunk(FAR_CHUNKS) for t in fields), strict=True):
        chunk = Inputs(
            x.detach().float().requires_grad_(),
            index,
            gates.detach().float().requires_grad_(),
            d_out.float(),
        )
        *rows, up, down = results(naive.moe_mlp, chunk, oracle)
        parts.append(rows)
        sums[0] += up
        sums[1] += down
    rows = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    pairs = zip([out, dx, d_gates, *d_bank], [*rows, *sums], strict=True)
    return [error(a, b) for a, b in pairs]

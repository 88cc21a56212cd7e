"""The scale, offset and codes of each block. A block's result depends on that block alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esft_kernels.quantised.kinds import SCALES, Kind

# How much of a block's range the search starts from: the fewer codes, the less an outlier is worth.
# Found on normal and on Student's t blocks; a wrong start costs accuracy, never correctness.
_START = {4: 0.95, 3: 0.85, 2: 0.7}
_STEPS = 3


@dataclass(frozen=True)
class Fit:
    """Blocks as they are stored.

    Attributes:
        codes: `[rows, B, block]` uint8, or int8 for `int8`.
        scale: `[rows, B]` bf16.
        offset: `[rows, B]` bf16; zeros for kinds that store none.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


def fit(weights: Tensor, kind: Kind) -> Fit:
    """Choose scales, offsets and codes for blocks `[rows, B, block]` of finite fp32 numbers."""
    if kind.offset:
        return _with_offset(weights, kind)
    largest = weights.abs().amax(-1)
    offset = torch.zeros_like(largest, dtype=SCALES)
    if kind.codebook is None:
        scale = _rounded(largest / kind.top)
        codes = weights.div(_divisor(scale)).round_().clamp_(-kind.top, kind.top)
        return Fit(codes.to(kind.code_dtype), scale.to(SCALES), offset)
    scale = _rounded(largest)
    parts = weights / _divisor(scale)
    codes = torch.zeros_like(weights, dtype=kind.code_dtype)
    book = torch.tensor(kind.codebook)
    # Exactly between two values the lower is taken, as by bitsandbytes. Faster than
    # `bucketize`.
    for middle in ((book[1:] + book[:-1]) / 2).tolist():
        codes += parts > middle
    return Fit(codes, scale.to(SCALES), offset)


def _with_offset(weights: Tensor, kind: Kind) -> Fit:
    """Lessen the squared error by turns: codes for a scale and offset, then these for the codes.

    For given codes, the best scale and offset are a linear regression of the weights on them; for
    given ones, the nearest codes are the best. Half-quadratic quantisation takes such turns too,
    with another measure and a fixed scale (Badri and Shaji, 2023, mobiusml.github.io/hqq_blog).
    The whole range is tried first: it reproduces what was stored this way before, exactly.
    """
    low, high = weights.aminmax(dim=-1)
    mean = weights.mean(-1)
    whole = _Line(_rounded(high / kind.top - low / kind.top), _rounded(low))
    best, least = whole, whole.error(weights, whole.codes(weights, kind))
    cut = (high - low) * ((1 - _START[kind.bits]) / 2)
    low, high = low + cut, high - cut
    line = _Line(_rounded(high / kind.top - low / kind.top), _rounded(low))
    for _ in range(_STEPS):
        codes = line.codes(weights, kind)
        best, least = _better(line, line.error(weights, codes), best, least)
        line = _regression(weights, codes, mean)
    best, _ = _better(line, line.error(weights, line.codes(weights, kind)), best, least)
    # Only where both ends are in use does storing the result anew give the same again.
    ends = best.codes(weights, kind).aminmax(dim=-1)
    best = best.where((ends.min == 0) & (ends.max == kind.top), whole)
    return Fit(
        best.codes(weights, kind).to(kind.code_dtype), best.scale.to(SCALES), best.offset.to(SCALES)
    )


@dataclass(frozen=True)
class _Line:
    """What codes of each block stand for: `scale * code + offset`, `[rows, B]` each in fp32."""

    scale: Tensor
    offset: Tensor

    def codes(self, weights: Tensor, kind: Kind) -> Tensor:
        """Return the nearest codes, in fp32."""
        codes = weights.sub(self.offset[..., None]).div_(_divisor(self.scale))
        return codes.round_().clamp_(0, kind.top)

    def error(self, weights: Tensor, codes: Tensor) -> Tensor:
        """Return each block's squared error."""
        values = torch.addcmul(self.offset[..., None], codes, self.scale[..., None])
        return values.sub_(weights).square_().sum(-1)

    def where(self, condition: Tensor, other: _Line) -> _Line:
        """Return this where the condition holds, and the other elsewhere."""
        return _Line(
            torch.where(condition, self.scale, other.scale),
            torch.where(condition, self.offset, other.offset),
        )


def _better(line: _Line, error: Tensor, best: _Line, least: Tensor) -> tuple[_Line, Tensor]:
    return line.where(error < least, best), torch.minimum(error, least)


def _regression(weights: Tensor, codes: Tensor, mean: Tensor) -> _Line:
    middle = codes.mean(-1)
    centred = codes - middle[..., None]
    spread = centred.square().sum(-1)
    slope = (centred.mul_(weights)).sum(-1) / torch.where(spread > 0, spread, torch.inf)
    scale = _rounded(slope)
    return _Line(scale, _rounded(mean - scale * middle))


def _rounded(numbers: Tensor) -> Tensor:
    """Round to what is stored; what is finite stays finite."""
    most = torch.finfo(SCALES).max
    return numbers.clamp(-most, most).to(SCALES).float()


def _divisor(scale: Tensor) -> Tensor:
    """Return what to divide a block's weights by: codes are 0 where the scale is."""
    return torch.where(scale == 0, torch.inf, scale)[..., None]

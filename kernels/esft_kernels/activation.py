"""The activation between an expert's two projections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SwiGLU:
    """`silu(gate) * up`, the activation that the Triton kernels compute themselves.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.

    Attributes:
        interleaved: whether the up projection's 2I outputs alternate (gate 0, up 0, gate 1, ...)
            instead of all gates before all ups.
    """

    interleaved: bool = False

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate and the up half of `[.., 2I]` as views, `[.., I]` each."""
        if self.interleaved:
            return z[..., ::2], z[..., 1::2]
        gate, up = z.chunk(2, dim=-1)
        return gate, up

    def __call__(self, z: Tensor) -> Tensor:
        """Map `[.., 2I]` to `[.., I]`."""
        gate, up = self.split(z)
        return F.silu(gate) * up

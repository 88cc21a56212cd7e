"""Rotary position embedding, arXiv 2104.09864."""

from __future__ import annotations

import torch
from torch import Tensor

# cos and sin of the angles, each `[B, S, D]`.
Angles = tuple[Tensor, Tensor]


def rotary_angles(position_BS: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Angles:
    """Return cos and sin of `position * theta ** (-2i / dim)`, for i and again for i + dim/2.

    Args:
        position_BS: positions, `[B, S]`.
        dim: D, how many channels of a head are rotated; even.
        theta: the base.
        dtype: of the result; the angles are computed in fp32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, dim, 2, device=position_BS.device, dtype=wide) / dim
    angle = position_BS[..., None].to(wide) * theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BASD: Tensor, angles: Angles) -> Tensor:
    """Rotate the first channels of every head, as many as there are angles.

    Args:
        x_BASD: queries or keys by head, `[B, heads, S, head_dim]`.
        angles: of the positions, as `rotary_angles` returns them.
    """
    cos, sin = (angle.unsqueeze(1) for angle in angles)
    turned, rest = x_BASD.split([cos.shape[-1], x_BASD.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)

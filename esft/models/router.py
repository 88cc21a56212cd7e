"""What the routers of our models share."""

from __future__ import annotations

import torch
from torch import Tensor


def router_logits(x: Tensor, weight_EH: Tensor) -> Tensor:
    """Return `x @ weight.T`, `[.., H]` -> `[.., E]`, in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) @ weight_EH.to(wide).T

"""DeepSeek-V3's load balancing without a loss: the bias with which a router chooses is moved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from esft import processes
from esft.errors import ModelError
from esft.moe import MoeLayer
from esft.routers.balance import bias_step, load
from esft.routers.watch import RouterPass

# As families call it: e_score_correction_bias, expert_bias, balancing_biases. A bias that is part
# of the logits (gpt-oss) is called `bias` and trains by gradients.
_NAME = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias|balancing_biases)$")


class BiasUpdate:
    """Counts who was chosen in a step, and moves every router's bias after it.

    `b_i += u * sign(mean(n) - n_i)`, n over all tokens of the step, accumulated batches too; see
    `esft.routers.balance.bias_step`. Where a router may choose none of the experts, the bias of
    that choice stays, and the mean is over the experts.

    A bias in bfloat16 would round small updates away, so it is kept in float32 in memory.

    Args:
        layers: with routers that choose.
        speed: u.

    Raises:
        ModelError: a router has no such bias.
    """

    def __init__(self, layers: Sequence[MoeLayer], speed: float, family: str) -> None:
        self._speed = speed
        self._loads: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        for layer in layers:
            found = [tensor for _, tensor in _biases(layer)]
            if len(found) != 1:
                raise ModelError(
                    f"losses.bias_update: {family}: the routers of this family have no bias to "
                    f"choose with (as e_score_correction_bias of deepseek_v3); set it to 0, and "
                    f"losses.load_balance or losses.expert_balance instead"
                )
            bias = found[0]
            bias.data = bias.data.to(torch.promote_types(bias.dtype, torch.float32))
            self._biases[layer.name] = bias

    def tensors(self) -> dict[str, Tensor]:
        """Return what the updates change, by the path of the layer's experts."""
        return {name: bias.detach() for name, bias in self._biases.items()}

    def count(self, passes: Sequence[RouterPass], counted_T: Tensor) -> None:
        """Add what routers chose in a batch, for tokens where `counted_T` is true."""
        for seen in passes:
            found = load(seen.index, seen.layer.num_experts, counted_T)
            before = self._loads.get(seen.layer.name)
            self._loads[seen.layer.name] = found if before is None else before + found

    def step(self) -> None:
        """Move the biases by what was counted since the last step; all processes must call this."""
        for name, load_E in self._loads.items():
            if processes.count() > 1:
                dist.all_reduce(load_E)
            bias = self._biases[name].data.view(-1)[: len(load_E)]
            bias += self._speed * bias_step(load_E).to(bias.dtype)
        self._loads.clear()


def _biases(layer: MoeLayer) -> Iterator[tuple[str, Tensor]]:
    block = layer.layout.block
    for name, tensor in (*block.named_buffers(), *block.named_parameters()):
        if _NAME.search(name) and tensor.numel() >= layer.num_experts:
            yield name, tensor

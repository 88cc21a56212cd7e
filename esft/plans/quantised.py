"""What loading in 4 or 8 bits would really quantise, and what a quantised checkpoint holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from esft.errors import EsftError
from esft.moe import MoeLayer

# bitsandbytes: bytes of a weight, and of the scale that a block of weights shares (fp32).
_WEIGHT = {"4bit": 0.5, "8bit": 1.0}
_SCALE_OF = {"4bit": 64, "8bit": None}  # weights of a block; in 8 bits, a row of the matrix


@dataclass(frozen=True)
class Quantised:
    """What transformers' bitsandbytes loader does with a model.

    Attributes:
        bits: `4bit` or `8bit`, as asked for.
        quantised: parameters that get quantised: linear layers but the output.
        left: parameters that stay as they are.
        experts_left: of these, the routed experts'.
        bytes: of all weights, as loaded.
        expected: what they would be if every matrix but embeddings and output were quantised.
        dtype: what the rest stays in.
    """

    bits: str
    quantised: int
    left: int
    experts_left: int
    bytes: int
    expected: int
    dtype: str

    @property
    def sound(self) -> bool:
        """Whether the routed experts, most of the model, are among what is quantised."""
        return not self.experts_left

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"sound": self.sound}


def check_load_in(
    model: nn.Module, layers: tuple[MoeLayer, ...], bits: str, dtype: torch.dtype
) -> Quantised:
    """Say what loading a model in 4 or 8 bits with transformers and bitsandbytes comes to.

    The loader replaces modules whose type is `nn.Linear`, but for the output layer
    (`transformers.integrations.bitsandbytes`). Experts that are fused into one parameter a layer
    are none, and stay in the dtype of the rest, without a word
    (bitsandbytes-foundation/bitsandbytes#1849).

    Args:
        model: on the meta device will do.
        layers: its MoE layers.
        bits: `4bit` or `8bit`.
        dtype: that what is not quantised is loaded in.

    Raises:
        EsftError: `bits` is neither.
    """
    if bits not in _WEIGHT:
        raise EsftError(f"--load-in {bits}: choose {' or '.join(_WEIGHT)}")
    output = model.get_output_embeddings()  # type: ignore[operator]
    linear = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module is not output
    }
    experts = {
        name for layer in layers for key in layer.layout.shapes() for name in _names(layer, key)
    }
    total = quantised = experts_left = 0
    size = expected = 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        whole = parameter.numel() * dtype.itemsize
        narrow = _narrow(parameter, bits)
        size += narrow if name in linear else whole
        expected += narrow if name in linear or name in experts else whole
        quantised += parameter.numel() * (name in linear)
        experts_left += parameter.numel() * (name in experts and name not in linear)
    return Quantised(
        bits=bits,
        quantised=quantised,
        left=total - quantised,
        experts_left=experts_left,
        bytes=int(size),
        expected=int(expected),
        dtype=str(dtype).removeprefix("torch."),
    )


def _names(layer: MoeLayer, key: str) -> tuple[str, ...]:
    return layer.layout.tensor_names(key)


def _narrow(weight: nn.Parameter, bits: str) -> float:
    block = _SCALE_OF[bits] or weight.shape[-1]
    return weight.numel() * _WEIGHT[bits] + 4 * weight.numel() / block

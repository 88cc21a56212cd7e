"""Low-rank factors that train in the selected experts' place (`esft.low_rank_sum` adds them).

One pair of factors for each tensor of the checkpoint that an expert has (gate, up and down, where
these are tensors of their own), whatever stack the model holds them in. arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esft.errors import ModelError
from esft.experts import attached_layers, is_shared
from esft.low_rank_delta import Factors
from esft.low_rank_sum import FactoredSum
from esft.names import Part, layer_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.fingerprint import Fingerprint


class LowRank(nn.Module):
    """The factors of one weight of a layer's selected experts. Lives in `banks.low_rank`.

    Args:
        places: for each pair, which numbers of an expert's flattened slice its product is added
            to: `[p, q]` int64.
        input_first: whether the p rows, and not the q columns, are what the expert multiplies its
            input by. The factor on the side of the input begins random, the other at 0.
        experts: n.
        r: the rank.
        scale: what the product is multiplied by, alpha / r.
        dtype: of the factors.
        device: where they live.

    Attributes:
        left: a factor `[n, p, r]` a pair.
        right: a factor `[n, r, q]` a pair.
    """

    def __init__(
        self,
        places: Sequence[Tensor],
        *,
        input_first: bool,
        experts: int,
        r: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.spots: list[slice | Tensor] = [_spot(place, device) for place in places]
        self.left, self.right = nn.ParameterList(), nn.ParameterList()
        for p, q in (place.shape for place in places):
            left = torch.zeros(experts, p, r, dtype=dtype, device=device)
            right = torch.zeros(experts, r, q, dtype=dtype, device=device)
            # As nn.Linear and PEFT initialise it.
            bound = 1 / math.sqrt(p if input_first else q)
            (left if input_first else right).uniform_(-bound, bound)
            self.left.append(nn.Parameter(left))
            self.right.append(nn.Parameter(right))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum `[n, ...]` in the dtype of `weight [n, ...]`, which is left as it is."""
        found: Tensor = FactoredSum.apply(weight, self.scale, self.spots, *self.left, *self.right)
        return found


def add_low_rank(
    model: PreTrainedModel, *, r: int, alpha: float, dtype: torch.dtype = torch.float32
) -> None:
    """Make factors of the attached experts train, in place of the experts themselves.

    Draws from torch's RNG. An expert's biases and norms do not train.

    Args:
        model: a selection is attached, and nothing else trains (see `esft.experts.attach`).
        r: the rank.
        alpha: the product is multiplied by alpha / r.
        dtype: of the factors.

    Raises:
        ModelError: no selection is attached, or its experts hold no matrix.
    """
    added = 0
    if is_shared(model):
        raise ModelError(
            "processes share this model's experts (DistributedConfig); low-rank "
            "factors of them are not put together again, train them as they are"
        )
    for attached in attached_layers(model):
        banks, layout = attached.banks, attached.layer.layout
        if not banks.selected:
            continue
        for name, found in layer_parts(model, attached.layer).items():
            bank = banks.bank(name)
            bank.requires_grad_(False)
            if any(part.numbers.dim() != 2 for part in found):
                continue
            factors = LowRank(
                [part.numbers for part in found],
                input_first=layout.input_first(name),
                experts=len(banks.selected),
                r=r,
                scale=alpha / r,
                dtype=dtype,
                device=bank.device,
            )
            banks.add_factors(name, factors)
            added += 1
    if not added:
        raise ModelError("the selected experts hold no matrix that could have low-rank factors")


def disk_factors(model: PreTrainedModel, base: Fingerprint) -> Iterator[Factors]:
    """Yield the factors of a model by the checkpoint's tensors, on the CPU.

    Args:
        model: `add_low_rank` was called.
        base: fingerprint of the checkpoint that it was loaded from, see `esft.names.layer_parts`.
    """
    for attached in attached_layers(model):
        banks = attached.banks
        found = layer_parts(model, attached.layer, base) if banks.selected else {}
        for name, parts in found.items():
            factors = banks.factors(name)
            if not isinstance(factors, LowRank):
                continue
            for part, left, right in zip(parts, factors.left, factors.right, strict=True):
                if part.numbers.shape != (left.shape[1], right.shape[2]):  # turned on disk
                    left, right = right.mT, left.mT
                yield from _by_tensor(part, banks.selected, _plain(left), _plain(right))


def _spot(place: Tensor, device: torch.device) -> slice | Tensor:
    """Return numbers of a flattened slice as what indexes them: without a copy if they adjoin."""
    flat = place.flatten()
    first = int(flat[0])
    adjoin = torch.equal(flat, torch.arange(first, first + len(flat)))
    return slice(first, first + len(flat)) if adjoin else flat.to(device)


def _by_tensor(
    part: Part, selected: Sequence[int], left: Tensor, right: Tensor
) -> Iterator[Factors]:
    if part.fused:
        yield Factors(part.names[0], left, right)
        return
    for place, expert in enumerate(selected):
        yield Factors(part.name(expert), left[place], right[place])


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().cpu().contiguous()

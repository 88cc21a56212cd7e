"""What the code of some families asks of tensors when it computes with experts.

DBRX, LongCat-Flash and Step-3 look which experts were chosen at all and which rows each of them
has; JetMoE asks how many rows each has, MoEUT's projections how many go to those that train. While
a model without content runs, the answer is: every expert, the rows spread evenly. How uneven the
rows of a real task are changes how large one expert's part is, not what all of them take together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from esft.layouts.layout import is_a
from esft.layouts.stacks import JetMoeLayout, StacksLayout
from esft.moe import moe_layers
from esft.plans.pretence import UNKNOWN, Oracle, Tracker

_aten = torch.ops.aten


def answer_loops(model: nn.Module, tracker: Tracker, share: float = 0.0) -> None:
    """Let the modules of a model that ask for routed rows run without content.

    Args:
        model: of tensors without content.
        tracker: of these.
        share: of the rows, what goes to experts that train.
    """

    def cut(index: Tensor) -> Oracle:
        return lambda function, *_: round(share * index.numel()) if _reads(function) else UNKNOWN

    for layer in moe_layers(model):
        if isinstance(layer.layout, StacksLayout) and not isinstance(layer.layout, JetMoeLayout):
            ids = max(layer.layout.rows().values())
            _answer(layer.layout.experts, tracker, lambda *_, ids=ids: _Experts(ids))
    for module in model.modules():
        if is_a(module, "JetMoeTopKGating"):  # of the attention's experts, too
            _answer(module, tracker, lambda *_: _Sizes())
        if is_a(module, "ProjectionExperts"):
            _answer(module, tracker, lambda _x, index, _weight: cut(index))


def _answer(module: nn.Module, tracker: Tracker, make: Callable[..., Oracle]) -> None:
    """Let an oracle answer while a module runs, made from what the module is called with."""
    module.register_forward_pre_hook(lambda _, args: tracker.oracles.append(make(*args)))
    module.register_forward_hook(lambda *_: _forget(tracker))


def _forget(tracker: Tracker) -> None:
    tracker.oracles.pop()


class _Experts:
    """Answers a loop over the experts that were chosen: all of them."""

    def __init__(self, ids: int) -> None:
        self.ids, self.asked = ids, 0

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is _aten.nonzero.default and isinstance(args[0], FakeTensor):
            if args[0].dim() == 1:  # which experts have any row
                with _disable_current_modes():
                    return torch.arange(self.ids)[:, None]
            # Which of the T*K choices are one expert's.
            rows = _share(args[0].numel(), self.ids, self.asked)
            self.asked += 1
            return args[0].new_empty(rows, args[0].dim(), dtype=torch.int64)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with _disable_current_modes():  # the number of an expert, known from above
                return function(*args, **kwargs)
        return UNKNOWN


class _Sizes:
    """Answers how many rows each of E experts has, one after the other."""

    def __init__(self) -> None:
        self.choices = self.ids = self.asked = 0

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is _aten.topk.default:
            tokens, self.ids = args[0].shape
            self.choices = tokens * args[1]
        if not _reads(function):
            return UNKNOWN
        size = _share(self.choices, self.ids, self.asked)
        self.asked += 1
        return size


def _reads(function: Any) -> bool:
    return function is _aten._local_scalar_dense.default


def _share(rows: int, experts: int, number: int) -> int:
    """Return how many of some rows one expert has, so that all together have them all."""
    return (number + 1) * rows // experts - number * rows // experts

"""What a model's experts are called with, seen without esft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Calls = dict[str, list[tuple[Tensor, Tensor]]]


def _of_llama4(router: Any, _args: Any, output: Any) -> tuple[Tensor, Tensor]:
    scores, logits = output
    index = logits.topk(router.top_k).indices
    return index, scores.gather(1, index)


def _of_jetmoe(router: Any, args: Any, _output: Any) -> tuple[Tensor, Tensor]:
    logits = router.layer(args[0]).float()
    top = logits.topk(router.top_k)
    return top.indices, top.values.softmax(-1).to(args[0].dtype)


def _of_switch(_router: Any, _args: Any, output: Any) -> tuple[Tensor, Tensor]:
    # Rounded to the model's dtype before the best is taken; whether it has room does not count.
    _, weight, logits = output
    return logits.softmax(-1).to(weight.dtype).argmax(-1, keepdim=True), weight


_ROUTERS = {"Llama4Router": _of_llama4, "SwitchTransformersTop1Router": _of_switch}


@contextmanager
def watched(model: nn.Module) -> Iterator[tuple[Calls, list[Tensor]]]:
    """Note, by the path of the experts, ids and weights of each call; and which tokens are real."""
    calls: Calls = {}
    real: list[Tensor] = []

    def note(path: str, found: tuple[Tensor, Tensor]) -> None:
        calls.setdefault(path, []).append(found)

    def note_mask(_module: nn.Module, _args: Any, kwargs: Any) -> None:
        mask, ids = kwargs["attention_mask"], kwargs["input_ids"]
        real.append((torch.ones_like(ids) if mask is None else mask).flatten().bool())

    handles = [model.base_model.register_forward_pre_hook(note_mask, with_kwargs=True)]  # type: ignore[union-attr, operator]
    for path, module in model.named_modules():
        kind = type(module).__name__
        block, _, own = path.rpartition(".")
        if kind in _ROUTERS:
            reader, experts = _ROUTERS[kind], f"{block}.experts"
        elif kind == "JetMoeTopKGating" and block.endswith(".mlp"):
            reader, experts = _of_jetmoe, block
        elif own == "experts" and kind not in ("Llama4TextExperts", "SwitchTransformersExperts"):
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, at=path: note(at, args[1:3]))
            )
            continue
        else:
            continue
        handles.append(
            module.register_forward_hook(
                lambda m, args, out, r=reader, at=experts: note(at, r(m, args, out))
            )
        )
    try:
        yield calls, real
    finally:
        for handle in handles:
            handle.remove()

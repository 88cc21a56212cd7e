"""Tensors without content, and what they would take: memory at each moment, and operations.

torch's fake tensors have a shape, a dtype and a device, and operations on them compute no more
than those. A model built of them runs its own code, at any size, in next to no memory; what a
kernel allocates inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_aten = torch.ops.aten

# Asked what an operation gives that looks at contents; returns UNKNOWN for any other.
Oracle = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
UNKNOWN = object()


@contextmanager
def pretending() -> Iterator[Tracker]:
    """Make every tensor that is created inside the block one without content.

    Yields:
        what has been counted so far.
    """
    usual = nn.Module._apply
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        nn.Module._apply = _apply  # type: ignore[method-assign]
        try:
            yield tracker
        finally:
            nn.Module._apply = usual  # type: ignore[method-assign]


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """Move or cast a module in place: torch's own way swaps fake parameters, and then refuses."""
    for child in module.children() if recurse else ():
        child._apply(convert)
    with torch.no_grad():
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = convert(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer)
    return module


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, and FLOPs.

    Attributes:
        live: bytes alive now.
        peak: the most that were, since the last `reset`.
        flops: floating-point operations of matrix products, convolutions and attention since the
            last `reset`; a multiply-add is two.
        oracles: what answers questions that only contents could, the last one first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.oracles: list[Oracle] = []
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        """Count the peak and the operations anew from here."""
        self.peak, self.flops = self.live, 0

    @contextmanager
    def finding(self, rows: int) -> Iterator[None]:
        """Inside the block, `nonzero` finds `rows`."""

        def found(function: Any, args: tuple[Any, ...], _: dict[str, Any]) -> Any:
            if function is not _aten.nonzero.default:
                return UNKNOWN
            return args[0].new_empty(rows, args[0].dim(), dtype=torch.int64)

        self.oracles.append(found)
        try:
            yield
        finally:
            self.oracles.remove(found)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and look at what it made."""
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:  # asked for at every turn; makes nothing
            return function(*args)
        out = self._run(function, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.flops += _flops(function, args, kwargs, out)
        return out

    def _run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is _aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            return _grouped_mm(*args, **kwargs)
        for oracle in reversed(self.oracles):
            if (answer := oracle(function, args, kwargs)) is not UNKNOWN:
                return answer
        return function(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":  # outlines of others
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Return a grouped product's shape: torch knows it for bf16 on a GPU only."""
    if a.dim() == b.dim() == 2:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1], dtype=out_dtype)
    return a.new_empty(a.shape[0], b.shape[-1], dtype=out_dtype)


def _flops(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    packet = getattr(function, "_overloadpacket", None)
    if packet in _FLOPS:
        return _FLOPS[packet](*args)
    if packet in flop_registry:
        count: int = flop_registry[packet](*args, **kwargs, out_val=out)
        return count
    return 0


def _grouped_flops(a: Tensor, b: Tensor, *_: Any) -> int:
    """Each row of `a` meets one matrix: `[M, k] x [G, k, n]`, or `[k, M] x [M, n]` in groups."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward_flops(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    # As torch counts its other kernels: the scores once more, and two products for each of two.
    return 5 * int(sdpa_flop_count(q.shape, k.shape, v.shape)) // 2


# What torch's own table lacks.
_FLOPS: dict[Any, Callable[..., int]] = {
    _aten._grouped_mm: _grouped_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}

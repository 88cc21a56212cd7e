"""A model's weights, there while a layer computes and gone afterwards."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from esft.streaming.decoder import DecoderLayer
from esft.weight_source import WeightSource


class Weights:
    """Brings the weights of decoder layers one after another, and others when they are called.

    A thread reads the next layer while one computes: weights of at most two are in memory. What
    stands outside the layers (embeddings, norms) is read when its module or the one around it is
    called, so what text never reaches, the head of a language model or an encoder of images, is
    never read.

    Attributes:
        read_bytes: bytes of the checkpoint that were read so far.
    """

    def __init__(
        self, source: WeightSource, layers: Sequence[DecoderLayer], device: torch.device
    ) -> None:
        self._source, self._layers, self._device = source, layers, device
        self._parameters = {name for name, _ in source.model.named_parameters()}
        self._reader = ThreadPoolExecutor(1, "esft-reader")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._outside = self._find_outside()
        self._loaded: set[nn.Module] = set()
        self._running: Counter[nn.Module] = Counter()
        self._done: set[nn.Module] = set()
        self.read_bytes = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the model's weights come when they are needed, while the block runs."""
        self._source.move_buffers(self._device)
        handles = []
        inside = {module for layer in self._layers for module in layer.module.modules()}
        for module in self._source.model.modules():
            if module not in inside:
                handles += [
                    module.register_forward_pre_hook(self._fetch),
                    module.register_forward_hook(self._leave),
                ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._reader.shutdown(cancel_futures=True)
            self._next = None
            self._source.empty(self._source.names)

    def begin(self) -> None:
        """Drop what only the way to the first layer needed: the embeddings."""
        for module in self._loaded & self._done:
            if not self._running[module]:
                self._source.empty(self._outside[module])
                self._loaded.discard(module)
        _give_back()

    def bring(self, index: int, *, ahead: bool = True) -> None:
        """Wait for a layer's weights and let the model have them; begin to read the next one's.

        Args:
            index: of the layer.
            ahead: whether the next layer will be needed.

        Raises:
            ModelError: a file of the checkpoint is missing or ends too early.
        """
        if self._next is None or self._next[0] != index:
            self._read_ahead(index)
        assert self._next is not None
        tensors = self._next[1].result()
        self._next = None
        self._put(tensors)
        if ahead and index + 1 < len(self._layers):
            self._read_ahead(index + 1)

    def drop(self, index: int) -> None:
        """Take a layer's weights from the model again, and give their memory back."""
        self._source.empty(self._names(index))
        _give_back()

    def _names(self, index: int) -> tuple[str, ...]:
        return self._source.under(self._layers[index].name)

    def _read_ahead(self, index: int) -> None:
        self._next = index, self._reader.submit(self._read, self._names(index))

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self._source.read(names)
        if self._device.type == "cuda":  # it copies pinned memory while it computes
            for name in tensors:
                tensors[name] = tensors[name].pin_memory()
        return tensors

    def _put(self, tensors: dict[str, Tensor]) -> None:
        self.read_bytes += self._source.stored_bytes(tensors)
        there = {name: t.to(self._device, non_blocking=True) for name, t in tensors.items()}
        # As in a loaded model, also without gradients: matmul looks at this when it chooses how to
        # multiply, and the last bit depends on it.
        self._source.put(
            {
                name: nn.Parameter(t, t.is_floating_point()) if name in self._parameters else t
                for name, t in there.items()
            }
        )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the pinned ones go now

    def _find_outside(self) -> dict[nn.Module, tuple[str, ...]]:
        """Return the modules outside the layers that have weights of their own, and these."""
        known = set(self._source.names)
        stored = self._source.model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in stored.items() if name in known}
        inside = {module for layer in self._layers for module in layer.module.modules()}
        head = self._source.model.get_output_embeddings()  # nobody asks it
        found = {}
        for module in self._source.model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            weights = tuple(names[id(tensor)] for tensor in own if id(tensor) in names)
            if weights and module not in inside and module is not head:
                found[module] = weights
        return found

    def _fetch(self, module: nn.Module, _args: Any) -> None:
        self._running[module] += 1
        # Its children's as well: some code asks a weight where it is before it calls its module.
        for needed in (module, *module.children()):
            if needed in self._outside and needed not in self._loaded:
                self._put(self._read(self._outside[needed]))
                self._loaded.add(needed)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self._running[module] -= 1
        self._done.add(module)


def _give_back() -> None:
    """Let the system have freed memory, where it can be asked to (glibc).

    What is freed below 32 MB stays with the process, and the next layer need not fit into its gaps.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)

"""A model's weights, there while a layer computes and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esft.streaming.decoder import DecoderLayer
from esft.weight_source import WeightSource


class Weights:
    """Brings the weights of decoder layers one after another, and others when they are called.

    A thread reads the next layer while one computes: weights of at most two are in memory. What
    stands outside the layers (embeddings, norms) is read when its module is called, so what text
    never reaches, the head of a language model or an encoder of images, is never read.

    Attributes:
        read_bytes: bytes of the checkpoint that were read so far.
    """

    def __init__(
        self, source: WeightSource, layers: Sequence[DecoderLayer], device: torch.device
    ) -> None:
        self._source, self._layers, self._device = source, layers, device
        self._reader = ThreadPoolExecutor(1, "esft-reader")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._loaded: dict[nn.Module, tuple[str, ...]] = {}
        self._calls: dict[nn.Module, int] = {}
        self.read_bytes = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the model's weights come when they are needed, while the block runs."""
        for buffers in (module._buffers for module in self._source.model.modules()):
            for name, buffer in buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    buffers[name] = buffer.to(self._device)
        handles = []
        for module, names in self._outside().items():
            handles += [
                module.register_forward_pre_hook(self._fetching(names)),
                module.register_forward_hook(self._left),
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
        for module in [module for module in self._loaded if not self._calls[module]]:
            self._source.empty(self._loaded.pop(module))

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
        """Take a layer's weights from the model again."""
        self._source.empty(self._names(index))

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
        self._source.put(
            {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        )
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the pinned ones go now

    def _outside(self) -> dict[nn.Module, tuple[str, ...]]:
        """Return the modules outside the layers that have weights of their own, and these."""
        model, known = self._source.model, set(self._source.names)
        stored = model.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in stored.items() if name in known}
        inside = {module for layer in self._layers for module in layer.module.modules()}
        found = {}
        for module in model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            weights = tuple(names[id(tensor)] for tensor in own if id(tensor) in names)
            if weights and module not in inside:
                found[module] = weights
        return found

    def _fetching(self, names: tuple[str, ...]) -> Callable[..., None]:
        def fetch(module: nn.Module, _args: Any) -> None:
            self._calls[module] = self._calls.get(module, 0) + 1
            if module not in self._loaded:
                self._put(self._read(names))
                self._loaded[module] = names

        return fetch

    def _left(self, module: nn.Module, _args: Any, _output: Any) -> None:
        self._calls[module] -= 1

"""A forward pass that stops before each decoder layer, so that many can go through it together.

The model's own code runs, whatever it hands from layer to layer: a pass that waits is a stack of
Python frames that stands still. Greenlets, not threads: one thread has one pool of workers, one
heap and one gradient mode, however many batches wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from types import FrameType
from typing import Any

import greenlet
from torch import Tensor, nn

from esft.streaming.decoder import DecoderLayer


@dataclass(frozen=True)
class Stop:
    """A pass waits before a decoder layer.

    Attributes:
        layer: the layer's index.
        waiting: the tensors that the pass holds, each once, the layer's own input first.
    """

    layer: int
    waiting: list[Tensor]


class Passage:
    """One batch's way through the model.

    Attributes:
        finished: how many calls of decoder layers it is past.
        stop: where it waits; None before the start and after the end.
        output: what the last layer returned, until the next `resume`.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self._greenlet = greenlet.greenlet(forward)
        self._known: Callable[[], Any] | None = None
        self.skipped = 0
        self.finished = 0
        self.stop: Stop | None = None
        self.output: Any = None

    def skip(self, calls: int, output: Callable[[], Any]) -> None:
        """Do not compute the first calls of decoder layers, which an earlier process has done.

        Args:
            calls: how many.
            output: makes what the last of them returned; the ones before return the same, which
                changes nothing but for models that look further back.
        """
        self.skipped, self._known = calls, output

    def resume(self) -> None:
        """Go on through one layer, to the next stop or the end; errors of the model come out."""
        self.output = None
        stop = self._greenlet.switch()
        self.stop = None if self._greenlet.dead else stop

    def close(self) -> None:
        """Give up: the model's frames are unwound, and what they hold is free."""
        if self._greenlet:  # started and not at its end
            self._greenlet.throw()
        self.stop = self.output = None

    def _before(self, layer: int, call: tuple[Any, ...]) -> None:
        if self.finished < self.skipped:
            return
        parent = greenlet.getcurrent().parent
        assert parent is not None
        parent.switch(Stop(layer, _unique([*_tensors(call), *_held(sys._getframe(2))])))

    def _after(self, output: Any) -> None:
        self.finished += 1
        self.output = output


@dataclass
class Passages:
    """The passes that share a model.

    Attributes:
        layers: of the model.
        head: of the language model; a pass that comes to it has nothing left to do, and waits as
            if for one more layer.
        current: the pass that runs or is about to.
    """

    layers: Sequence[DecoderLayer]
    head: nn.Module | None
    current: Passage | None = field(default=None)

    def resume(self, passage: Passage) -> None:
        """Let one pass go on; see `Passage.resume`."""
        self.current = passage
        passage.resume()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let passes stop before the layers while the block runs."""
        stops = [(layer.module, layer.index) for layer in self.layers]
        stops += [(self.head, len(self.layers))] if self.head is not None else []
        handles = [
            module.register_forward_pre_hook(self._stop_before(index), with_kwargs=True)
            for module, index in stops
        ]
        for layer in self.layers:
            handles.append(layer.module.register_forward_hook(self._note_output))
            layer.module.forward = self._skipping(layer.module.forward)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers:
                del layer.module.forward  # the class's own again

    def _stop_before(self, index: int) -> Callable[..., None]:
        def stop(_module: nn.Module, args: Any, kwargs: Any) -> None:
            assert self.current is not None
            self.current._before(index, (args, kwargs))

        return stop

    def _note_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self.current is not None
        self.current._after(output)

    def _skipping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def skip_or_run(*args: Any, **kwargs: Any) -> Any:
            passage = self.current
            assert passage is not None
            if passage.finished < passage.skipped:
                assert passage._known is not None
                return passage._known()
            return forward(*args, **kwargs)

        return skip_or_run


def _held(frame: FrameType | None) -> Iterator[Tensor]:
    """Yield the tensors in the variables of a frame and of all that wait for it."""
    while frame is not None:
        names = frame.f_locals
        yield from _tensors(tuple(names.values()))
        # Before Python 3.13 this is a copy, which the frame keeps, and the tensors with it.
        if type(names) is dict:
            names.clear()
        frame = frame.f_back


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, Mapping):  # some are no dicts, so that others leave them alone
        for item in value.values():
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value))
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)


def _unique(tensors: Iterator[Tensor] | Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())

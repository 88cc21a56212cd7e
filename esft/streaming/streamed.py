"""A sample through a checkpoint that does not fit in memory, one decoder layer at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch

from esft.errors import ModelError, OutputError
from esft.progress import SILENT, Reporter, Task
from esft.streaming.decoder import DecoderLayer, decoder_layers
from esft.streaming.partial import Partial, Reached
from esft.streaming.passage import Passage, Passages
from esft.streaming.state_file import StateFile
from esft.streaming.trees import UnsavableError, read_tree, write_tree
from esft.streaming.waiting import Shared, Waiting
from esft.streaming.weights import Weights
from esft.tally import Batch, Tally
from esft.weight_source import WeightSource


@dataclass(frozen=True)
class Streamed:
    """What it took.

    Attributes:
        read_bytes: of the checkpoint.
        hidden_bytes: the most that batches held in memory between two layers.
        skipped: calls of layers that an earlier process had done.
    """

    read_bytes: int
    hidden_bytes: int
    skipped: int


def run_streamed(
    source: WeightSource,
    tally: Tally,
    batches: Sequence[Batch],
    *,
    device: torch.device,
    hidden_memory: int,
    partial: Partial | None = None,
    reporter: Reporter = SILENT,
) -> Streamed:
    """Run batches through a model whose weights come from disk, each of them once.

    All batches go through a layer, one after another, before the next layer; its weights are read
    meanwhile. So two layers are in memory, and what the batches hold between layers. The model's
    own code runs, and computes nothing in another way than with all weights in memory.

    Args:
        source: of the weights; its model has none yet, and none in the end.
        tally: counts.
        batches: of the sample.
        device: that computes.
        hidden_memory: bytes that the batches may hold in memory between two layers on a CPU; what
            is beyond waits in a file in `partial`'s folder, or a temporary one.
        partial: of an earlier process, which this one goes on from, and kept up layer by layer;
            None keeps nothing.
        reporter: told where it begins, and of layers done.

    Raises:
        ModelError: a file of the checkpoint is missing or ends too early, the family cannot be
            profiled, or its layers are not called in the same order for all batches.
        OutputError: the file of what waits cannot be written.
    """
    start = bound(_Run, source, tally, batches, device, hidden_memory, partial, reporter)
    if partial is None:
        return start().go(None)
    reached = partial.reached()
    if isinstance(reached, Reached):
        try:
            return start().go(reached)
        except _LooksBackError:
            reached = "this family keeps more from layer to layer than could be saved"
    if reached is not None:
        reporter.note(f"{partial.folder}: {reached}; starting from the first layer")
    partial.clear()
    tally.restore({})
    return start().go(None)


class _LooksBackError(Exception):
    """A model's layers see more than what the layer before them has returned."""


@dataclass
class _Traveller:
    """A batch, its way through the model, and what it holds between two layers.

    Attributes:
        output: of the last layer, as `write_tree` describes it.
    """

    batch: Batch
    passage: Passage
    waiting: Waiting
    output: Any = None


class _Run:
    def __init__(
        self,
        source: WeightSource,
        tally: Tally,
        batches: Sequence[Batch],
        device: torch.device,
        hidden_memory: int,
        partial: Partial | None,
        reporter: Reporter,
    ) -> None:
        self._model, self._tally, self._device = source.model, tally, device
        self._hidden_memory, self._reporter = hidden_memory, reporter
        self._kept = self._partial = partial  # the second until saving fails
        self._layers = decoder_layers(source.model, source.layers)
        self._last = max(layer.index for layer in self._layers if layer.moe)
        self._weights = Weights(source, self._layers, device)
        self._passages = Passages(self._layers, source.model.get_output_embeddings())
        shared = Shared()
        self._travellers = [
            _Traveller(batch, Passage(bound(self._forward, batch)), Waiting(shared))
            for batch in batches
        ]
        self._in_memory = self._most_in_memory = self._finished = 0

    def go(self, reached: Reached | None) -> Streamed:
        """Run all batches to the end, from the first layer or where an earlier process was."""
        with (
            torch.no_grad(),
            self._tally.hooked(),
            self._passages.hooked(),
            self._weights.hooked(),
            self._places() as place,
            self._reporter.task("profiling", total=self._last + 1, unit="layer") as task,
        ):
            try:
                self._begin(reached, place)
                task.advance(self._finished)
                while (layer := self._next()) is not None:
                    self._weights.bring(layer.index, ahead=layer.index < self._last)
                    self._through(layer, place, task)
                    self._weights.drop(layer.index)
                    task.advance()
            except (Exception, KeyboardInterrupt) as error:
                if self._kept is not None and not isinstance(error, _LooksBackError):
                    self._tell_what_is_kept(self._kept)
                raise
            finally:
                for traveller in self._travellers:
                    traveller.passage.close()
        return Streamed(
            self._weights.read_bytes,
            self._most_in_memory,
            0 if reached is None else reached.finished,
        )

    def _forward(self, batch: Batch) -> None:
        # The base model: nothing is wanted of the head.
        self._model.base_model(**batch.inputs(self._device))

    def _begin(self, reached: Reached | None, place: Callable[[str], Path]) -> None:
        """Bring all batches before the layer that is to be computed first."""
        with contextlib.ExitStack() as stack:
            if reached is not None:
                self._finished = reached.finished
                file = stack.enter_context(open(reached.states, "rb")).fileno()
                counted = {name: t.to(self._device) for name, t in reached.counted.items()}
                self._tally.restore(counted)
                for traveller, state in zip(self._travellers, reached.batches, strict=True):
                    known = bound(read_tree, state["output"], file, self._device)
                    traveller.passage.skip(reached.finished, known)
            states = stack.enter_context(self._new_file(place("begin.bin")))
            try:
                for traveller in self._travellers:
                    self._resume(traveller, states)
            except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
                if reached is None:
                    raise
                raise _LooksBackError from error
        _delete(states.path)
        self._weights.begin()
        if reached is not None and any(
            traveller.waiting.digests() != state["waiting"]
            for traveller, state in zip(self._travellers, reached.batches, strict=True)
        ):
            raise _LooksBackError

    def _next(self) -> DecoderLayer | None:
        """Return the layer that all batches wait for; None if nothing more is to be counted."""
        stops = {t.passage.stop.layer if t.passage.stop else None for t in self._travellers}
        if len(stops) > 1:
            raise ModelError(
                f"{type(self._model).__name__}: its batches do not all pass the same layers; it "
                f"cannot be streamed: give --no-stream"
            )
        index = stops.pop() if stops else None
        return None if index is None or index > self._last else self._layers[index]

    def _through(self, layer: DecoderLayer, place: Callable[[str], Path], task: Task) -> None:
        """Run all batches through a layer, to the next."""
        self._finished += 1
        states = self._new_file(place(f"states-{self._finished:04}.bin"))
        kept = False
        try:
            for number, traveller in enumerate(self._travellers, start=1):
                self._resume(traveller, states)
                task.advance(0, batch=number)
            if self._partial is not None and self._next() is not None:
                kept = self._commit(self._partial, layer, states)
        finally:
            if not kept:  # what is mapped of it stays until it is let go
                states.close()
                _delete(states.path)

    def _resume(self, traveller: _Traveller, states: StateFile) -> None:
        """Let a batch go on to its next stop, and keep what it waits with."""
        passage, waiting = traveller.passage, traveller.waiting
        self._tally.begin(traveller.batch, self._device)
        self._passages.resume(passage)
        written: dict[int, int] = {}
        if self._partial is not None and passage.finished > passage.skipped:
            with self._going_on_without_it():
                traveller.output = write_tree(passage.output, states, written)
        passage.output = None
        if passage.stop is None:
            return
        others = self._in_memory - waiting.in_memory
        # On a GPU they stay where they are: they are little beside two layers.
        file = states if self._device.type == "cpu" else None
        waiting.stop(passage.stop.waiting, self._hidden_memory - others, file, written)
        passage.stop.waiting.clear()
        self._in_memory = others + waiting.in_memory
        self._most_in_memory = max(self._most_in_memory, self._in_memory)

    def _commit(self, partial: Partial, layer: DecoderLayer, states: StateFile) -> bool:
        """Note that all batches are past a layer; return whether the file is the folder's now."""
        own = {str(moe.index) for moe in layer.moe}
        counted = {
            name: tensor
            for name, tensor in self._tally.tensors().items()
            if name.partition(".")[2] in own
        }
        batches = [
            {"output": traveller.output, "waiting": traveller.waiting.digests()}
            for traveller in self._travellers
        ]
        with self._going_on_without_it():
            partial.commit(self._finished, batches, states, counted)
            return True
        return False

    def _new_file(self, path: Path) -> StateFile:
        return StateFile(path, f"what {len(self._travellers):,} batches hold between two layers")

    @contextmanager
    def _places(self) -> Iterator[Callable[[str], Path]]:
        """Yield a function from the name of a file to where it goes."""
        if self._partial is not None:
            yield self._partial.folder.joinpath
            return
        with tempfile.TemporaryDirectory(prefix="esft-", ignore_cleanup_errors=True) as folder:
            yield Path(folder).joinpath

    @contextmanager
    def _going_on_without_it(self) -> Iterator[None]:
        """Stop saving where that fails in the block: the scores do not depend on it."""
        assert self._partial is not None
        try:
            yield
        except (OutputError, UnsavableError) as error:
            why = (
                f"{error}"
                if isinstance(error, OutputError)
                else f"{type(self._model).__name__}: its layers return {error} objects"
            )
            self._reporter.note(f"{why}; going on, but layers from here on are not saved")
            self._partial = None

    def _tell_what_is_kept(self, partial: Partial) -> None:
        with contextlib.suppress(OutputError):
            partial.wait()
        if partial.finished:
            self._reporter.note(
                f"{partial.folder}: keeps the first {partial.finished} of {self._last + 1} layers; "
                f"the same command goes on from there"
            )


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()

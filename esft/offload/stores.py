"""Where the experts are that are not at hand: in files, or in the host's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from esft_kernels.quantised import Quantised, quantise
from torch import Tensor

from esft.errors import ModelError
from esft.moe import MoeLayer
from esft.offload.weights import Weights, pinned, plain_tensors, weight_bytes
from esft.progress import SILENT, Reporter
from esft.shard_writer import Source, write_shards
from esft.shards import open_checkpoint
from esft.tensors import read_numbers, tensor_blocks
from esft.weight_source import WeightSource

_STEM = "experts"
# Storage of a weight by bits a number. Of the two in 4 bits, int4 has an offset for each block as
# those in 3 and 2 have, and lost less: see bench/README.md.
KINDS = {8: "int8", 4: "int4", 3: "int3", 2: "int2"}


class ExpertStore(Protocol):
    """Gives any expert, to any thread."""

    def shape(self, layer: MoeLayer) -> Weights:
        """Return what `read` gives of a layer's experts, on the meta device."""

    def read(self, layer: MoeLayer, expert: int) -> Weights:
        """Return one expert, on the CPU.

        Raises:
            ModelError: a file is gone or damaged.
        """

    def close(self) -> None:
        """Give back what the store takes."""


class CheckpointStore:
    """The checkpoint's own files, read expert by expert, in the dtype that the model has."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def shape(self, layer: MoeLayer) -> Weights:
        """See `ExpertStore.shape`."""
        shapes: Weights = {}
        for weight, shape in layer.layout.shapes().items():
            dtype = self._source.dtype(layer.layout.tensor_names(weight)[0])
            shapes[weight] = torch.empty(shape[1:], dtype=dtype, device="meta")
        return shapes

    def read(self, layer: MoeLayer, expert: int) -> Weights:
        """See `ExpertStore.read`."""
        return dict(self._source.read_expert(layer, expert))

    def close(self) -> None:
        """See `ExpertStore.close`."""


class QuantisingStore:
    """Another store's experts in fewer bits, made anew each time; biases stay as they are."""

    def __init__(self, store: ExpertStore, bits: int) -> None:
        self._store, self._kind = store, KINDS[bits]

    def shape(self, layer: MoeLayer) -> Weights:
        """See `ExpertStore.shape`."""
        return self._quantised(self._store.shape(layer))

    def read(self, layer: MoeLayer, expert: int) -> Weights:
        """See `ExpertStore.read`.

        Raises:
            ModelError: a file is gone or damaged, or holds numbers that are not finite.
        """
        try:
            return self._quantised(self._store.read(layer, expert))
        except ValueError as error:
            raise ModelError(
                f"{layer.name}: expert {expert} cannot be quantised: {error}"
            ) from error

    def close(self) -> None:
        """See `ExpertStore.close`."""
        self._store.close()

    def _quantised(self, weights: Weights) -> Weights:
        return {
            name: quantise(weight, self._kind)
            if isinstance(weight, Tensor) and weight.dim() > 1
            else weight
            for name, weight in weights.items()
        }


class FileStore:
    """Another store's experts, written once to a file for the time being, one after the other.

    The file lies in the system's folder for temporary files (set TMPDIR for another one).
    """

    def __init__(
        self, store: ExpertStore, layers: Sequence[MoeLayer], reporter: Reporter = SILENT
    ) -> None:
        """Write the file.

        Raises:
            ModelError: as `ExpertStore.read` of the other store.
            OutputError: the disk is full.
        """
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="esft-experts-")
        count = sum(layer.num_experts for layer in layers)
        try:
            with reporter.task("storing experts", count, "expert") as task:

                def blocks(layer: MoeLayer, expert: int) -> Iterator[bytes]:
                    for _, _, tensor in _by_width(store.read(layer, expert)):
                        yield from tensor_blocks(tensor.contiguous())
                    task.advance()

                sources = [
                    Source(_key(layer, expert), "U8", (size,), size, partial(blocks, layer, expert))
                    for layer in layers
                    for size in [weight_bytes(store.shape(layer))]
                    for expert in range(layer.num_experts)
                ]
                write_shards(Path(self._folder.name), _STEM, sources)
            self._entries = open_checkpoint(Path(self._folder.name), _STEM).entries
        except BaseException:
            self._folder.cleanup()
            raise

    def shape(self, layer: MoeLayer) -> Weights:
        """See `ExpertStore.shape`."""
        return self._store.shape(layer)

    def read(self, layer: MoeLayer, expert: int) -> Weights:
        """See `ExpertStore.read`."""
        content = read_numbers(self._entries[_key(layer, expert)])
        shape = self._store.shape(layer)
        parts: dict[str, dict[str, Tensor]] = {}
        start = 0
        for name, part, like in _by_width(shape):
            own = content[start : start + like.nbytes]
            parts.setdefault(name, {})[part] = own.view(like.dtype).view(like.shape)
            start += like.nbytes
        return {
            name: Quantised.restore(parts[name], weight.metadata())
            if isinstance(weight, Quantised)
            else parts[name][""]
            for name, weight in shape.items()
        }

    def close(self) -> None:
        """See `ExpertStore.close`."""
        self._store.close()
        self._folder.cleanup()


class PinnedStore:
    """Another store's experts in page-locked memory of the host, from where a GPU takes them.

    Not run so far: no GPU was to be had.
    """

    def __init__(
        self, store: ExpertStore, layers: Sequence[MoeLayer], reporter: Reporter = SILENT
    ) -> None:
        """Read and pin all experts.

        Raises:
            ModelError: as `ExpertStore.read` of the other store, or the host's memory is too small.
        """
        self._store = store
        self._experts: dict[str, Weights] = {}
        count = sum(layer.num_experts for layer in layers)
        with reporter.task("storing experts", count, "expert") as task:
            for layer in layers:
                for expert in range(layer.num_experts):
                    try:
                        held = pinned(store.read(layer, expert))
                    except RuntimeError as error:
                        raise ModelError(
                            f"{layer.name}: the host's memory does not hold all experts: {error}; "
                            f"try --expert-bits 4, or --device cpu"
                        ) from error
                    self._experts[_key(layer, expert)] = held
                    task.advance()

    def shape(self, layer: MoeLayer) -> Weights:
        """See `ExpertStore.shape`."""
        return self._store.shape(layer)

    def read(self, layer: MoeLayer, expert: int) -> Weights:
        """See `ExpertStore.read`."""
        return dict(self._experts[_key(layer, expert)])

    def close(self) -> None:
        """See `ExpertStore.close`."""
        self._store.close()
        self._experts.clear()


def _key(layer: MoeLayer, expert: int) -> str:
    return f"{layer.index}.{expert}"


def _by_width(weights: Weights) -> list[tuple[str, str, Tensor]]:
    """List an expert's tensors, wide numbers first, so that each is aligned in one buffer."""
    return sorted(plain_tensors(weights), key=lambda item: -item[2].itemsize)

"""What is counted while a sample runs through a model in batches, and the scores of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esft.cooccurrence import Cooccurrence
from esft.data.batching import batches, padded
from esft.data.example import Example
from esft.diagnostics import routing
from esft.errors import DataError
from esft.layer_scores import HalfScores, LayerScores
from esft.moe import Anatomy
from esft.processes import summed
from esft.routing import HALVES, NOT_COUNTED, PARTS, RoutingSums, Watcher
from esft.scores import Scores
from esft.selection_rule import DEFAULT_P
from esft.stability import stability
from esft.token_routing import TokenRouting

COUNTS = ("all", "prompt", "completion")


class Share(NamedTuple):
    """What one of several processes takes of a sample."""

    number: int
    of: int


WHOLE = Share(0, 1)


@dataclass(frozen=True)
class Batch:
    """Rows that run through the model together.

    Attributes:
        rows: their numbers in the sample.
        ids: token ids, padded on the right, `[B, S]`, on the CPU.
        real: 1 where it is not padding, `[B, S]`.
        half: of each of the B*S tokens: 0, 1 or `NOT_COUNTED`, `[T]`.
        part: of the sample that it is in, see `esft.routing.RoutingSums`.
    """

    rows: list[int]
    ids: Tensor
    real: Tensor
    half: Tensor
    part: int

    @property
    def tokens(self) -> int:
        """How many tokens it has, without padding."""
        return int(self.real.sum())

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the base model's forward call."""
        return {
            "input_ids": self.ids.to(device),
            "attention_mask": None if self.real.all() else self.real.to(device),
            "use_cache": False,
        }


class Tally:
    """Counts what a model's routers decide for a sample; see `esft.profiling.profile_model`."""

    def __init__(
        self, found: Anatomy, examples: Sequence[Example], count: str, *, cooccurrence: bool
    ) -> None:
        """Prepare to count.

        Args:
            found: of the model.
            examples: the sample.
            count: which tokens count: `all`, or only those of the `prompt` or the `completion`.
            cooccurrence: also count how often two experts of a layer serve the same token.

        Raises:
            DataError: no token counts.
        """
        self._found, self._examples, self._count = found, examples, count
        self._masks = [_counted(example, count) for example in examples]
        self._total = sum(map(sum, self._masks))
        if not self._total:
            raise DataError(f"--count {count}: no token of the sample counts")
        # Every other row goes to the second half of the sample.
        self._halves = [
            [row % HALVES if counted else NOT_COUNTED for counted in mask]
            for row, mask in enumerate(self._masks)
        ]
        ids = [example.input_ids for example in examples]
        self._by_token = TokenRouting(ids, self._halves)
        self._pairs = Cooccurrence() if cooccurrence else None
        watchers: list[Watcher] = [self._by_token, *([self._pairs] if self._pairs else [])]
        self._sums = RoutingSums(found.layers, watchers)

    def batches(self, size: int, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield the sample in batches of at most `size` padded tokens, but at least one row.

        Only those of a share of it, which may have none.
        """
        for part, rows in self._shared(size, share):
            ids, real = padded([self._examples[row].input_ids for row in rows])
            half = padded([self._halves[row] for row in rows], NOT_COUNTED)[0]
            yield Batch(rows, ids, real, half.flatten(), part)

    def rows(self, size: int, share: Share = WHOLE) -> int:
        """Return how many rows `batches` would yield."""
        return sum(len(rows) for _, rows in self._shared(size, share))

    def hooked(self) -> AbstractContextManager[None]:
        """Count while the block runs, see `esft.routing.RoutingSums.hooked`."""
        return self._sums.hooked()

    def begin(self, batch: Batch, device: torch.device) -> None:
        """Say which batch the model works on from now on."""
        self._sums.half_T, self._sums.part = batch.half.to(device), batch.part
        self._by_token.batch(batch.ids, batch.half)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that was counted so far, `KIND.LAYER` -> sums, on the devices of the layers.

        All of it is added up over tokens: the sums of two parts of a sample, added, are the
        sums of the whole.
        """
        return {
            f"{kind}.{layer}": tensor
            for kind, counter in self._counters().items()
            for layer, tensor in counter.by_layer.items()
        }

    def add_up(self) -> None:
        """Take what all processes counted, each a share of the sample, for what was counted here.

        Raises:
            ElsewhereError, LostProcessError: see `esft.processes.together`.
        """
        nowhere = torch.device("cpu")
        own = {
            f"{kind}.{layer.index}": counter.by_layer.get(
                layer.index, counter.zeros(layer, nowhere)
            )
            for kind, counter in self._counters().items()
            for layer in self._found.layers
        }
        whole = dict(zip(own, summed(list(own.values()), "profile"), strict=True))
        # What no process was called for is left out, as in one process.
        self.restore({name: tensor for name, tensor in whole.items() if tensor.any()})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take sums of `tensors` for what was counted so far, in the place of what was."""
        for kind, counter in self._counters().items():
            counter.by_layer = {
                int(name.partition(".")[2]): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{kind}.")
            }

    def scores(self, name: str, bytes_per_parameter: int) -> Scores:
        """Return the scores of the whole sample, when all of its batches are through.

        Args:
            name: what the scores call the model.
            bytes_per_parameter: of the checkpoint.

        Raises:
            ModelError: a router did not choose K of E experts for each token.
        """
        found = self._found
        tokens = [sum(map(sum, self._masks[half::HALVES])) for half in range(HALVES)]
        whole = self._sums.scores(range(HALVES), self._total)
        parts = (
            [self._sums.scores([half], tokens[half]) for half in range(HALVES)]
            if all(tokens)
            else []
        )
        layers = {
            layer.index: replace(
                whole[layer.index],
                halves=tuple(_half(part[layer.index]) for part in parts),
                routing=routing(whole[layer.index].counts(), self._by_token.fixed(layer)),
                cooccurrence=self._pairs.counts(layer) if self._pairs else None,
            )
            for layer in found.layers
        }
        return Scores(
            layers=layers,
            model={
                "name": name,
                "model_type": found.model_type,
                "architecture": found.architecture,
                "parameters": found.total,
                "routed_parameters": found.routed,
                "expert_parameters": found.per_expert,
                "bytes_per_parameter": bytes_per_parameter,
            },
            sample={
                "count": self._count,
                "tokens": self._total,
                "sequences": len(self._examples),
            },
            stability=stability(whole, parts, DEFAULT_P) if parts else {},
        )

    def _shared(self, size: int, share: Share) -> Iterator[tuple[int, list[int]]]:
        """Yield the batches of a share: the part that they are in, and the numbers of the rows."""
        lengths = [len(example.input_ids) for example in self._examples]
        for number, rows in enumerate(batches(lengths, size)):
            part = number % PARTS
            if part % share.of == share.number:
                yield part, rows

    def _counters(self) -> dict[str, RoutingSums | TokenRouting | Cooccurrence]:
        pairs = {"pairs": self._pairs} if self._pairs else {}
        return {"routing": self._sums, "ids": self._by_token, **pairs}


def _counted(example: Example, count: str) -> list[bool]:
    if count == "all":
        return [True] * len(example.input_ids)
    return [answer == (count == "completion") for answer in example.completion]


def _half(layer: LayerScores) -> HalfScores:
    assert layer.tokens is not None  # it was counted here
    return HalfScores(layer.tokens, layer.token, layer.gate)

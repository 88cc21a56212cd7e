"""What a plan says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from esft.plans.batch import Batch
from esft.plans.inference import Inference
from esft.plans.quantised import Quantised
from esft.plans.stored import Stored


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, while one process trains.

    Attributes:
        frozen: weights and buffers that do not train, in the dtype that they are loaded in.
        trained: weights that do, in the dtype that they train in.
        gradients: of these.
        optimizer: its state.
        start: the copy of what trains that tells afterwards how much moved; on a CPU only, as on a
            GPU it lies in the host's memory.
        activations: everything else at the fullest moment of a step: what the backward pass needs,
            the logits, and what comes and goes.
        loading: the most while the model is made ready to train.
        training: the sum, at the fullest moment of a step.
        profiling: the most while experts are scored, to select some and to measure routing drift;
            0 where they are not.
        evaluation: the most while rows of `data.eval`, `data.test` and other domains are scored;
            0 where there are none.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    start: int
    activations: int | None
    loading: int
    training: int | None
    profiling: int | None
    evaluation: int | None

    @property
    def without_activations(self) -> int:
        """What does not depend on the batch."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.start

    @property
    def peak(self) -> int | None:
        """The most at one time; None where activations are not known."""
        rest = self.without_profiling
        return None if rest is None or self.profiling is None else max(rest, self.profiling)

    @property
    def without_profiling(self) -> int | None:
        """The same where experts are scored in a run of their own."""
        if self.training is None or self.evaluation is None:
            return None
        return max(self.loading, self.training, self.evaluation)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        known = self.without_activations
        return asdict(self) | {"without_activations": known, "peak": self.peak}


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes.

    Attributes:
        delta: what training changed, in the checkpoint's dtype (an adapter's in fp32).
        checkpoint: one training state: what trains, and the optimizer.
        checkpoints: those that are kept, and the one being written; 0 where none are saved.
        merged: the checkpoint that the delta can be merged into; not part of the run.
    """

    delta: int
    checkpoint: int
    checkpoints: int
    merged: int

    @property
    def total(self) -> int:
        """What the run's folder needs at most."""
        return self.delta + self.checkpoints

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Case:
    """A plan for one number of experts.

    Attributes:
        experts: how many train, in all layers; 0 where none is selected.
        fewest: of one layer; `most` likewise.
        trained: parameters that train.
        share: of the model's.
        memory: what it takes.
        disk: likewise.
        flops: floating-point operations of one optimizer step: matrix products, attention and
            convolutions, forward and backward; a multiply-add is two. None where not known.
        obstacle: why activations and operations are not known, where they are not.
    """

    experts: int
    fewest: int
    most: int
    trained: int
    share: float
    memory: Memory
    disk: Disk
    flops: int | None
    obstacle: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"memory": self.memory.to_dict(), "disk": self.disk.to_dict()}


@dataclass(frozen=True)
class Processes:
    """Bytes per device with several processes, by formula.

    Attributes:
        count: how many.
        loading: the most before and after training, in each process: it has the whole model, to
            score experts and rows by, until FSDP2 shards it.
        replicated: peak with plain data parallel: everything on each device, and the buckets in
            which gradients are summed.
        sharded: while training with FSDP2 (full shard): weights, gradients and optimizer state
            divided, two layers gathered at a time, activations as with one. None where the run
            cannot be sharded.
        by_expert: while training with expert parallelism: of the experts' weights, gradients and
            optimizer state each has its part, of everything else all. None where something else
            than selected experts trains, or where frozen weights are in few bits.
        node: bytes that each machine reads: the checkpoint. The first also has the run's folder.
        tokens_per_second: of data parallel at the speed of the probe, if nothing were lost to the
            exchange of gradients; None without a probe.
    """

    count: int
    loading: int | None
    replicated: int | None
    sharded: int | None
    by_expert: int | None
    node: int
    tokens_per_second: float | None = None

    @property
    def sharded_peak(self) -> int | None:
        """The most with FSDP2 at any time, the whole model before it is sharded included."""
        return None if self.sharded is None else max(self.sharded, self.loading or 0)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {"sharded_peak": self.sharded_peak}


@dataclass(frozen=True)
class Change:
    """A change of the recipe, and what comes of it.

    Attributes:
        keys: of the recipe, as `--set` takes them; empty for more processes.
        words: what it is and what it costs.
        peak: bytes per device after it.
        fits: whether that is within the memory asked for.
    """

    keys: dict[str, Any]
    words: str
    peak: int
    fits: bool


@dataclass(frozen=True)
class Fit:
    """Whether the run fits into some memory, and what would make it fit.

    Attributes:
        memory: bytes of the device.
        fits: whether the larger case does.
        changes: cheapest first: each by itself, then together until it fits; empty if it fits.
        verdict: one line.
        streams: whether `esft profile` would go through the model one layer at a time.
    """

    memory: int
    fits: bool
    changes: tuple[Change, ...]
    verdict: str
    streams: bool = False


@dataclass(frozen=True)
class Probe:
    """Real steps, taken here, and what they say of the run.

    Attributes:
        layers: of the model that took them; random weights of the real shapes.
        of_layers: of the whole model.
        seconds: of one of its steps, the median.
        flops_per_second: what that is.
        step_seconds: of the whole model, at that speed.
        total_seconds: of all steps; None where their number is not known.
        tokens_per_second: of the whole model, padding included.
    """

    layers: int
    of_layers: int
    seconds: float
    flops_per_second: float
    step_seconds: float
    total_seconds: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        model: as in the recipe.
        method: likewise.
        device: `cpu` or `cuda`, which the plan is for.
        dtype: that weights are loaded in.
        param_dtype: that selected experts train in.
        optimizer: as `training.optim`.
        parameters: of the model by kind, see `esft.plans.parameters`.
        stored: the checkpoint on disk.
        batch: the heaviest.
        selection: how the number of experts is known, or what its bounds are.
        few: the case with the fewest experts.
        many: the one with the most; the same where the number is known.
        inference: the model when it does not train.
        fit: whether it fits into the memory asked about, if any.
        processes: figures for several, if asked for.
        load_in: what loading in 4 or 8 bits would quantise, if asked for.
        probe: real steps, if asked for.
        notes: what else a reader should know.
    """

    model: str
    method: str
    device: str
    dtype: str
    param_dtype: str
    optimizer: str
    parameters: dict[str, int]
    stored: Stored
    batch: Batch
    selection: str
    few: Case
    many: Case
    inference: Inference
    fit: Fit | None
    processes: Processes | None
    load_in: Quantised | None
    probe: Probe | None
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        """All parameters of the model, tied ones once."""
        return sum(self.parameters.values())

    @property
    def peak(self) -> int | None:
        """The most bytes on the device at one time, in the larger case."""
        return self.many.memory.peak

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {
            "total": self.total,
            "peak": self.peak,
            "stored": self.stored.to_dict(),
            "load_in": self.load_in and self.load_in.to_dict(),
            "batch": self.batch.to_dict(),
            "processes": self.processes and self.processes.to_dict(),
            "few": self.few.to_dict(),
            "inference": self.inference.to_dict(),
            "many": self.many.to_dict(),
        }

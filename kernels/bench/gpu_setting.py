"""What the GPU benchmarks share: shapes, a layer's tensors, and timing on the device.

On a CPU everything runs too, small, in Triton's interpreter: so that the scripts are tested where
there is no GPU. Times mean nothing there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from esft_kernels import ExpertBank, Projection, SwiGLU, config, tiled
from esft_kernels.bank import frozen_ids, slot_map
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer of experts: H, I, E and K."""

    hidden: int
    inner: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Scale:
    """How large everything is, and how often it is timed.

    Attributes:
        shapes: the models' layers.
        tokens: T, by name.
        sets: inputs that take turns, so that none is still in the cache from the run before.
        repeats: timed runs, after `warm_up` others.
        warm_up: runs that are not timed.
    """

    shapes: dict[str, Shape]
    tokens: dict[str, int]
    sets: int
    repeats: int
    warm_up: int


FULL = Scale(
    {
        "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
        "DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6),
    },
    {"32k": 32768, "8k": 8192},
    sets=3,
    repeats=20,
    warm_up=3,
)
SMOKE = Scale(
    {"Qwen3-30B-A3B": Shape(32, 16, 4, 2), "DeepSeek-V2-Lite": Shape(32, 24, 4, 1)},
    {"32k": 12, "8k": 6},
    sets=2,
    repeats=1,
    warm_up=0,
)


@dataclass(frozen=True)
class Inputs:
    """One batch: x and d_out `[T, H]`, ids and gates `[T, K]`."""

    x: Tensor
    index: Tensor
    gates: Tensor
    d_out: Tensor


def weights(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw bf16 weights: `[E, 2I, H]` and `[E, H, I]`."""
    H, I, E = shape.hidden, shape.inner, shape.experts  # noqa: E741

    def draw(rows: int, columns: int) -> Tensor:
        scale = columns**-0.5
        return torch.randn(E, rows, columns, device=device, dtype=torch.bfloat16) * scale

    return draw(2 * I, H), draw(H, I)


def inputs(shape: Shape, tokens: int, popularity: Tensor, device: torch.device) -> Inputs:
    """Draw a batch whose tokens choose K different experts, by their popularity `[E]`."""
    # The K largest of log p + Gumbel noise are a draw without replacement.
    noise = -torch.empty(tokens, shape.experts, device=device).exponential_().log()
    index = (popularity.to(device).log() + noise).topk(shape.top_k).indices
    gates = torch.randn(tokens, shape.top_k, device=device).softmax(-1).to(torch.bfloat16)

    def draw() -> Tensor:
        return torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)

    return Inputs(draw().requires_grad_(), index, gates.requires_grad_(), draw())


def popularity(routing: str, experts: int) -> Tensor:
    """Return how often experts are chosen, `[E]`: alike, or `skewed` by Zipf's law (1 / rank)."""
    rank = torch.arange(1, experts + 1, dtype=torch.float32)
    return torch.ones(experts) if routing == "uniform" else (1 / rank)[torch.randperm(experts)]


def select(index: Tensor, experts: int, share: float) -> list[int]:
    """Return the fewest experts that get this share of the rows, the most chosen first."""
    counts = torch.bincount(index.reshape(-1), minlength=experts)
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    return order[: int((before < share * index.numel()).sum())].tolist()


def make_bank(up: Tensor, down: Tensor, selected: list[int]) -> ExpertBank:
    """Copy weights into two banks: the selected experts in fp32, the others as they are."""
    rest = frozen_ids(selected, up.shape[0])

    def projection(weight: Tensor) -> Projection:
        return Projection(weight[selected].float().requires_grad_(), weight[rest])

    slot = slot_map(selected, up.shape[0], up.device)
    return ExpertBank(projection(up), projection(down), slot, SwiGLU())


def trainables(bank: ExpertBank) -> list[Tensor]:
    """Return the trainable bank."""
    return [bank.up.trainable, bank.down.trainable]


Lap = Callable[[], None]


def measure(
    run: Callable[[int, Lap], None], device: torch.device, scale: Scale
) -> list[list[float]]:
    """Time the phases of something, in ms.

    Args:
        run: called with a number from 0 and with a function that it calls after each phase.
        device: times come from its events, or on a CPU from the clock.
        scale: how often.

    Returns:
        For each phase the times of all runs.
    """
    stamps: list[list[torch.cuda.Event | float]] = []

    def lap() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            stamps[-1].append(event)
        else:
            stamps[-1].append(time.perf_counter())

    if device.type == "cuda":
        _lead(device)
    for i in range(scale.warm_up + scale.repeats):
        stamps.append([])
        lap()
        run(i, lap)
    if device.type == "cuda":
        torch.cuda.synchronize()
    runs = [
        [_milliseconds(start, end) for start, end in itertools.pairwise(run)]
        for run in stamps[scale.warm_up :]
    ]
    return [list(times) for times in zip(*runs, strict=True)]


@functools.cache
def _large_matrix(device: torch.device) -> Tensor:
    return torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)


def _lead(device: torch.device) -> None:
    """Give the device some 50 ms of work, so that launches are waiting for it from then on.

    Otherwise the time between two events of a short kernel is that of the Python around it.
    """
    matrix = _large_matrix(device)
    for _ in range(30):
        torch.mm(matrix, matrix)


def _milliseconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        return 1e3 * (end - start)
    return start.elapsed_time(end)


def middle(times: list[float]) -> float:
    """Return the median."""
    return statistics.median(times)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let fresh memory hold NaN, and the largest number where it is whole: nobody may read it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that have no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def using(tiles: config.Config) -> Iterator[None]:
    """Let the Triton path take these tile sizes instead of the table's."""
    look, tiled.layer_config = tiled.layer_config, lambda *_: tiles
    try:
        yield
    finally:
        tiled.layer_config = look


def error(value: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over the norm of the reference; NaN where one is NaN."""
    scale = reference.double().norm().clamp_min(1e-30)
    return float((value.double() - reference.double()).norm() / scale)


def pick_device(smoke: bool) -> torch.device:
    """Return the GPU, or the CPU for a smoke test.

    Raises:
        SystemExit: there is no GPU, or a smoke test runs without Triton's interpreter.
    """
    if smoke:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("--smoke runs on the CPU: set TRITON_INTERPRET=1")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: try --smoke with TRITON_INTERPRET=1")
    return torch.device("cuda")


def card(device: torch.device) -> str:
    """Say what this runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return f"{name}; torch {torch.__version__}, triton {triton.__version__}"

"""Weights in few bits on a CPU: how fast they are stored and read, and what a layer pays for it.

    OMP_NUM_THREADS=1 PYTHONPATH=.:cli:kernels python kernels/bench/quantised.py

The layers are those of `cpu.py`, and one with experts as large as Qwen3-30B-A3B's, 16 of its 128;
10 % of the rows go to experts that train. Before a quantised layer is timed, its output is compared
with that of a layer whose frozen weights are what the quantised ones stand for.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from unittest.mock import patch

import torch
from cpu import BOUNDS, SHAPES, WARM_UP, Case, Shape, peak_bytes
from esft_cli.memory import keep_freed_memory
from esft_kernels import chunks
from esft_kernels.quantised import KINDS, quantise
from setting import cpus, in_turn, machine, ratio, table

from esft.loading import DTYPES

LAYERS = {**SHAPES, "2048x768": Shape(16, 2, 2048, 768)}
SHARE = 0.10
TRAINING = ("int8", "nf4")
SCRATCH_MB = (1, 4, 16, 64, 256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    print(machine(), end="\n\n")
    print(speed(args.repeats), end="\n\n")
    print(layers(args.repeats), end="\n\n")
    print(scratch(args.repeats))


def speed(repeats: int) -> str:
    """Return a table of the kinds: size, error, speed both ways."""
    torch.manual_seed(0)
    weight = (torch.randn(8, 1024, 1024) * 0.02).bfloat16()
    out = torch.empty_like(weight)
    rows = []
    for name, kind in KINDS.items():
        stored = quantise(weight, name)
        error = (stored.dequantise(torch.float32) - weight.float()).norm() / weight.float().norm()
        works: dict[str, Callable[[], object]] = {
            "in": lambda name=name: quantise(weight, name),
            "out": lambda stored=stored: stored.dequantise(out=out),
            "copy": lambda: out.copy_(weight),
        }
        times = {key: cpus(found) for key, found in in_turn(works, repeats).items()}
        rate = {key: weight.numel() / statistics.median(found) for key, found in times.items()}
        cells = [name, f"{kind.bits_per_weight():.2f}", f"{100 * error:.2f} %"]
        cells += [f"{rate['in'] / 1e6:.0f} M/s", f"{rate['out'] / 1e9:.2f} G/s"]
        rows.append([*cells, f"{2 * rate['out'] / 1e9:.1f}", ratio(times["out"], times["copy"])])
    header = ["kind", "bits a weight", "error", "weights quantised", "weights dequantised"]
    return table([*header, "GB/s of bf16", "time / copying bf16"], rows)


def layers(repeats: int) -> str:
    """Return a table of layers: a step's CPU time and memory, dense and quantised."""
    rows = []
    for name, dtype in itertools.product(LAYERS, BOUNDS):
        case = Case(LAYERS[name], DTYPES[dtype], SHARE)
        steps = {"dense": case.ours()} | {kind: case.ours(kind) for kind in TRAINING}
        for kind in TRAINING:
            check(case, kind, BOUNDS[dtype])
        times = {key: cpus(found) for key, found in in_turn(steps, repeats, WARM_UP).items()}
        peaks = {key: peak_bytes(step) for key, step in steps.items()}
        frozen = (case.shape.E - len(case.selected)) * 3 * case.shape.H * case.shape.I
        bank = {
            "dense": DTYPES[dtype].itemsize * 8,
            **{k: KINDS[k].bits_per_weight() for k in TRAINING},
        }
        cells = [name, dtype, f"{1000 * statistics.median(times['dense']):.0f}"]
        cells += [ratio(times[kind], times["dense"]) for kind in TRAINING]
        cells += [f"{bank[key] / 8 * frozen / 1e6:.1f} MB" for key in steps]
        rows.append([*cells, *(f"{peaks[key] / 1e6:.1f} MB" for key in steps)])
    header = ["layer", "dtype", "dense, CPU ms", *(f"{kind} / dense" for kind in TRAINING)]
    whose = ("dense", *TRAINING)
    kinds = ("frozen bank", "step's peak")
    return table([*header, *(f"{what}: {who}" for what in kinds for who in whose)], rows)


def check(case: Case, kind: str, bound: float) -> None:
    """Compare with a layer whose weights are the quantised ones, dense."""
    for stack in case.experts.parameters():
        stack.data = quantise(stack.data, kind).dequantise()
    dense, stored = case.ours(), case.ours(kind)
    dense(), stored()
    expected = dense.out.detach().float()
    error = float((stored.out.detach().float() - expected).norm() / expected.norm())
    assert error < bound, f"{kind}: {error:.1e}"


def scratch(repeats: int) -> str:
    """Return a table of how much is dequantised at a time: a step's CPU time to the dense one's."""
    rows = []
    for name in LAYERS:
        case = Case(LAYERS[name], torch.bfloat16, SHARE)
        stored = case.ours("nf4")

        def limited(size: int, step: Callable[[], None] = stored) -> Callable[[], None]:
            def run() -> None:
                with patch.dict(chunks.SCRATCH_BYTES, cpu=size * 2**20):
                    step()

            return run

        works = {"dense": case.ours(), **{str(size): limited(size) for size in SCRATCH_MB}}
        times = {key: cpus(found) for key, found in in_turn(works, repeats).items()}
        rows.append([name, *(ratio(times[str(s)], times["dense"]) for s in SCRATCH_MB)])
    return table(["layer in bfloat16", *(f"{size} MiB / dense" for size in SCRATCH_MB)], rows)


if __name__ == "__main__":
    main()

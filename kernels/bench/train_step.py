"""A training step of ESFT against full fine-tuning and LoRA: time, peak memory, where it goes.

    OMP_NUM_THREADS=1 PYTHONPATH=.:cli:kernels python kernels/bench/train_step.py tiny-moe

ESFT trains the experts selected at p = 0.2 after real profiling; LoRA is PEFT's with r = 8 on the
experts (`target_parameters`) and every linear layer; full trains everything. All three run on
transformers' `grouped_mm` and the optimizer that Trainer takes by default, fused AdamW.
Time is taken in turn in one process. Peak memory is taken in a process for each method: the
highest resident size during three steps, less what was resident before the first.
All methods run with freed memory kept, as the `esft` command runs; `--plain-malloc` leaves glibc
as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from esft_cli.memory import keep_freed_memory
from setting import MODELS, Setting, Times, cpus, in_turn, machine, ratio, setting, table, walls
from torch.profiler import ProfilerActivity, profile

from esft.methods import ExpertMethod, FullMethod, LoraMethod, Method
from esft.profiling import profile_model
from esft.recipe_sections import LoraSpec
from esft.scores import Scores
from esft.selection import Selection, select

METHODS = ("full", "lora", "esft")
PHASES = ("forward", "backward", "optimizer")


class Step:
    """A method's model, and the three phases of its training step."""

    def __init__(self, case: Setting, name: str, selection: Selection) -> None:
        methods: dict[str, Callable[[], Method]] = {
            "full": FullMethod,
            "lora": lambda: LoraMethod(LoraSpec(r=8)),
            "esft": lambda: ExpertMethod(selection),
        }
        self.model = methods[name]().prepare(case.model())
        self.model.train()
        self.batch = case.batch
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer_ = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def forward(self) -> None:
        self.loss = self.model(**self.batch).loss

    def backward(self) -> None:
        self.loss.backward()

    def optimizer(self) -> None:
        self.optimizer_.step()
        self.optimizer_.zero_grad()

    def __call__(self) -> None:
        for phase in PHASES:
            getattr(self, phase)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--plain-malloc", action="store_true")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.plain_malloc:
        keep_freed_memory()
    case = setting(args.model, args.dtype)
    if args.memory_of:
        experts = json.loads(sys.stdin.read())
        selection = Selection({int(layer): ids for layer, ids in experts.items()})
        print(json.dumps(peak_memory(Step(case, args.memory_of, selection))))
        return
    print(machine(), end="\n\n")
    warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
    scores = profile_model(case.model().eval(), case.sample)
    selection = select(scores, metric="token", p=0.2)
    print(describe(case, scores, selection), end="\n\n")
    memory = {name: memory_of(name, args, selection) for name in METHODS}
    steps = {name: Step(case, name, selection) for name in METHODS}
    times = in_turn(steps, args.repeats)
    print(comparison(steps, times, memory), end="\n\n")
    print(breakdown(steps, min(3, args.repeats)))


def describe(case: Setting, scores: Scores, selection: Selection) -> str:
    """Say what runs, and what share of the routed rows goes to trainable experts."""
    rows = [sum(scores.layers[i].token[e] for e in ids) for i, ids in selection.experts.items()]
    counts = [len(ids) for ids in selection.experts.values()]
    B, S = case.batch["input_ids"].shape
    return (
        f"{case.name}, {case.dtype}, batch {B} x {S}; selected {min(counts)} to {max(counts)} of "
        f"{next(iter(scores.layers.values())).experts} experts a layer, which get "
        f"{100 * sum(rows) / len(rows):.0f} % of the routed rows"
    )


def memory_of(name: str, args: argparse.Namespace, selection: Selection) -> tuple[int, int]:
    """Take a method's peak memory in a process of its own."""
    command = [sys.executable, __file__, args.model, "--dtype", args.dtype, "--memory-of", name]
    command += ["--plain-malloc"] * args.plain_malloc
    given = json.dumps(selection.experts)
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout))


def peak_memory(step: Step) -> tuple[int, int]:
    """Return by how much three steps raise the resident size at most, and to what; in bytes."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    for _ in range(3):
        step()
    peak = resident("VmHWM")
    return peak - before, peak


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def comparison(
    steps: dict[str, Step], times: dict[str, list[Times]], memory: dict[str, tuple[int, int]]
) -> str:
    """Return the table of methods."""
    rows = []
    for name, step in steps.items():
        row = [name, f"{step.trained:,}", f"{statistics.median(walls(times[name])):.2f} s"]
        for against in ("full", "lora"):
            for clock in (walls, cpus):
                row.append(
                    "1" if name == against else ratio(clock(times[name]), clock(times[against]))
                )
        more, total = memory[name]
        row += [f"{more / 1e6:,.0f} MB", f"{more / memory['full'][0]:.2f}"]
        row += [f"{total / 1e6:,.0f} MB", f"{total / memory['full'][1]:.2f}"]
        rows.append(row)
    return table(
        [
            *("method", "trained", "step"),
            *("time / full", "CPU time / full", "time / lora", "CPU time / lora"),
            *("memory of steps", "/ full", "peak memory", "/ full"),
        ],
        rows,
    )


def breakdown(steps: dict[str, Step], count: int) -> str:
    """Return where one step goes, in milliseconds by phase and kind of operation."""
    spent: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        rounds = [profiled(step) for _ in range(count)]
        spent[name] = {
            key: statistics.median(each[key] for each in rounds)
            for key in sorted(set().union(*rounds), key=in_order)
        }
        spent[name]["all"] = sum(spent[name].values())
    keys = sorted({key for found in spent.values() for key in found}, key=in_order)
    rows = [[key, *(f"{spent[name].get(key, 0):,.0f}" for name in steps)] for key in keys]
    return table([f"ms of one step, median of {count} under the profiler", *steps], rows)


def profiled(step: Step) -> dict[str, float]:
    """Return where one step goes, in milliseconds by phase and kind of operation."""
    spent: dict[str, float] = defaultdict(float)
    for phase in PHASES:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            getattr(step, phase)()
        for event in found.events():
            spent[f"{phase}: {kind(event)}"] += event.self_cpu_time_total / 1000
    return spent


def kind(event: Any) -> str:
    """Say what an operation is for."""
    above = event
    while above is not None:
        if above.name == "aten::_grouped_mm":
            # The gradient of the weights is a product of two matrices, row group by row group.
            return "experts' weight gradient" if len(above.input_shapes[1]) == 2 else "experts"
        above = above.cpu_parent
    if "nll" in event.name or "log_softmax" in event.name:
        return "loss"
    if any(word in event.name for word in ("scaled_dot", "bmm", "softmax")):
        return "attention"
    if event.name in ("aten::mm", "aten::addmm"):
        return "other products"
    return "all else"


def in_order(kind: str) -> tuple[int, str]:
    """Sort by phase, the sum last."""
    phase = kind.split(":")[0]
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), kind)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()

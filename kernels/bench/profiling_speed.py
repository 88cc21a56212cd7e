"""How much of a bare forward pass's speed does profiling keep?

    OMP_NUM_THREADS=1 PYTHONPATH=.:cli:kernels python kernels/bench/profiling_speed.py

Bare is the model without its output layer, under `no_grad`, on the very batches that profiling
makes; profiling is `esft.profiling.profile_model` whole: batches, padding, hooks, sums, scores.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from esft_cli.memory import keep_freed_memory
from setting import MODELS, cpus, in_turn, machine, ratio, setting, table, walls

from esft.profiling import profile_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    keep_freed_memory()  # as the `esft` command does
    print(machine(), end="\n\n")
    rows = [measure(name, args.repeats) for name in args.models]
    header = ["model", "tokens", "bare, tokens/s", "profiling, tokens/s"]
    print(table([*header, "speed kept, wall", "speed kept, CPU time"], rows))


def measure(name: str, repeats: int) -> list[str]:
    """Return the table's row of a model."""
    case = setting(name)
    model = case.model().eval()
    calls: list[dict[str, Any]] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda _module, _args, options: calls.append(options), with_kwargs=True
    )
    profile_model(model, case.sample)
    handle.remove()

    @torch.no_grad()
    def bare() -> None:
        for call in calls:
            model.base_model(**call)

    works = {"bare": bare, "profile": lambda: profile_model(model, case.sample)}
    times = in_turn(works, repeats)
    tokens = sum(len(example.input_ids) for example in case.sample)
    speed = {key: tokens / statistics.median(walls(found)) for key, found in times.items()}
    return [
        name,
        f"{tokens:,} in {len(calls)} batches",
        f"{speed['bare']:,.0f}",
        f"{speed['profile']:,.0f}",
        ratio(walls(times["bare"]), walls(times["profile"])),
        ratio(cpus(times["bare"]), cpus(times["profile"])),
    ]


if __name__ == "__main__":
    main()

"""Merging a large random checkpoint: time against `cp -r`, and memory.

    PYTHONPATH=.:cli:kernels python kernels/bench/merge_speed.py --gigabytes 10 --folder DIR

Makes a checkpoint of experts in shards of 1 GB and a delta of 5 % of them in DIR, then copies and
merges it in turn. Each run is a process of its own, and what it wrote is synced to the disk within
its time, and removed after it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from esft_cli.memory import keep_freed_memory
from safetensors.torch import save_file
from setting import machine, ratio, table

from esft.changes import Changed
from esft.delta import write_delta
from esft.files import write_json
from esft.fingerprint import fingerprint
from esft.shards import open_checkpoint

SHARD = 10**9
SHAPE = (768, 2048)  # of one projection of an expert of Qwen3-30B-A3B
MERGE = "import sys, esft; esft.merge(*sys.argv[1:4])"
# Not getrusage: what that tells of a new process includes its parent's memory.
MEMORY = "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    base, delta, out = (args.folder / name for name in ("base", "delta", "out"))
    make(base, delta, round(args.gigabytes * 1e9))
    importing = peak(["-c", f"import esft.merging; {MEMORY}"])
    works = {
        "cp -r": ["cp", "-r", str(base), str(out)],
        "esft merge": [sys.executable, "-c", f"{MERGE}; {MEMORY}", str(base), str(delta), str(out)],
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    memory = 0
    for repeat in range(args.repeats):
        names = list(works) if repeat % 2 else list(works)[::-1]
        for name in names:
            start = time.perf_counter()
            ran = subprocess.run(works[name], check=True, capture_output=True, text=True)
            subprocess.run(["sync", "-f", str(args.folder)], check=True)
            times[name].append(time.perf_counter() - start)
            memory = max(memory, int(ran.stdout or 0))
            shutil.rmtree(out)
    size = sum(file.stat().st_size for file in base.iterdir())
    print(machine(), end="\n\n")
    rows = [
        [
            name,
            f"{statistics.median(found):.1f} s",
            f"{size / statistics.median(found) / 1e9:.2f} GB/s",
            ratio(found, times["cp -r"]),
        ]
        for name, found in times.items()
    ]
    print(table([f"{size / 1e9:.1f} GB", "time", "rate", "time / cp -r"], rows))
    print(
        f"\npeak memory of the merge: {memory / 1024:.0f} MB, of which {importing / 1024:.0f} MB "
        f"are there once its modules are imported"
    )


def make(base: Path, delta: Path, size: int) -> None:
    """Write a checkpoint of about `size` bytes, and a delta of 5 % of its tensors."""
    base.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    count = size // (2 * SHAPE[0] * SHAPE[1])
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(count)]
    each = SHARD // (2 * SHAPE[0] * SHAPE[1])
    files = [names[start : start + each] for start in range(0, count, each)]
    weight_map = {}
    for number, held in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {n: torch.randn(SHAPE, generator=generator).bfloat16() for n in held}
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(base / "config.json", {"model_type": "qwen3_moe"})
    delta.mkdir()
    changes = (Changed(n, torch.randn(SHAPE, generator=generator).bfloat16()) for n in names[::20])
    about = {"method": "esft", "base": {"name": "random"}}
    write_delta(delta, fingerprint(open_checkpoint(base)), changes, about)


def peak(command: list[str]) -> int:
    """Return the peak memory in kB that a Python process prints last."""
    ran = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    return int(ran.stdout)


if __name__ == "__main__":
    main()

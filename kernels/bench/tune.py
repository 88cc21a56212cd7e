"""Choose tile sizes by measuring them on the GPU at hand, and write them to the table.

    PYTHONPATH=kernels python kernels/bench/tune.py --minutes 9

For each model's shape and number of rows per expert: candidates that spill or need too much shared
memory are dropped after a compilation in processes of their own; each kernel of the others is
timed in bf16 on inputs that take turns; the fastest of each kernel make an entry, once a layer
with them agrees with the PyTorch path. `configs/<architecture>.json` is written after each entry;
other entries stay as they are. No entry starts when the minutes are over.

    TRITON_INTERPRET=1 PYTHONPATH=kernels python kernels/bench/tune.py --smoke --configs FOLDER

runs the same on a CPU with tiny shapes; its choices mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import esft_kernels
import torch
from esft_kernels import config, grouped, tiled
from gpu_checks import BOUND, RESULTS, results
from gpu_kernels import kernel_runs
from gpu_setting import (
    FULL,
    SMOKE,
    Inputs,
    Lap,
    Scale,
    Shape,
    card,
    error,
    inputs,
    make_bank,
    measure,
    middle,
    pick_device,
    poisoned,
    popularity,
    select,
    using,
    weights,
)

CONFIGS = Path(esft_kernels.__file__).parent / "configs"
AHEAD_OF_TIME = Path(__file__).with_name("ahead_of_time.py")
Tiles = dict[str, int]
Entry = dict[str, Any]


def _each(**values: tuple[int, ...]) -> list[Tiles]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


_LOOP = {"BK": (32, 64), "num_warps": (4, 8), "num_stages": (3, 4)}
CANDIDATES = {
    "up_swiglu_fwd": _each(BN=(64, 128), **_LOOP),
    "grouped_gemm": _each(BN=(128, 256), **_LOOP),
    "gather_sum": _each(BT=(2, 4, 8), BH=(512, 1024), num_warps=(4, 8), num_stages=(1,)),
    # A whole tile does not fit the registers in the epilogue, see down_dact_bwd.
    "down_dact_bwd": _each(BN=(64, 128), SPLIT=(2,), **_LOOP),
    "wgrad_selected": _each(
        BP=(128,), BQ=(128, 256), BR=(32, 64), num_warps=(4, 8), num_stages=(3, 4)
    ),
}
BLOCK_M, ROWS = (64, 128), (32, 512)
_TINY = {"num_warps": (4,), "num_stages": (2,)}
SMOKE_CANDIDATES = {
    "up_swiglu_fwd": _each(BN=(16, 32), BK=(32,), **_TINY),
    "grouped_gemm": _each(BN=(16, 32), BK=(32,), **_TINY),
    "gather_sum": _each(BT=(4, 8), BH=(32,), **_TINY),
    "down_dact_bwd": _each(BN=(16, 32), SPLIT=(2,), BK=(32,), **_TINY),
    "wgrad_selected": _each(BP=(32,), BQ=(16, 32), BR=(16,), **_TINY),
}
SMOKE_BLOCK_M, SMOKE_ROWS = (16,), (8,)


def in_packs(candidates: dict[str, list[Tiles]]) -> list[dict[str, Tiles]]:
    """Return tile sizes for all kernels such that each candidate of a kernel occurs in one."""
    longest = max(map(len, candidates.values()))
    return [
        {name: listed[i % len(listed)] for name, listed in candidates.items()}
        for i in range(longest)
    ]


def fitting(
    arch: str,
    shape: Shape,
    rows: int,
    block_m: int,
    candidates: dict[str, list[Tiles]],
    layouts: list[str],
) -> dict[str, list[Tiles]]:
    """Return the candidates that neither spill nor need too much shared memory, in any layout."""
    key = {"H": shape.hidden, "I": shape.inner, "rows": rows, "itemsize": 2, "block_m": block_m}
    entries = [key | pack for pack in in_packs(candidates)]
    workers = min(os.cpu_count() or 1, len(entries))
    with ThreadPoolExecutor(workers) as pool:
        shares = [entries[i::workers] for i in range(workers)]
        lines = [
            line
            for found in pool.map(lambda e: _compile(arch, e, layouts), shares)
            for line in found
        ]
    rejected = [(line["kernel"], line["constants"] | line["options"]) for line in lines]

    def fits(name: str, tiles: Tiles) -> bool:
        return not any(
            kernel == f"_{name}" and tiles.items() <= used.items() for kernel, used in rejected
        )

    return {name: [c for c in listed if fits(name, c)] for name, listed in candidates.items()}


def _compile(arch: str, entries: list[Entry], layouts: list[str]) -> list[dict[str, Any]]:
    """Compile entries in a process that does not interpret; return the lines that do not fit."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        table.write_text(json.dumps({"entries": entries}), encoding="utf-8")
        command = [sys.executable, AHEAD_OF_TIME, arch, "--entries", table, "--layouts", *layouts]
        ran = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    _, *lines = map(json.loads, ran.stdout.splitlines())
    return [line for line in lines if not line["fits"]]


def tune(
    arch: str,
    shape: Shape,
    rows: int,
    device: torch.device,
    scale: Scale,
    candidates: dict[str, list[Tiles]],
    blocks: tuple[int, ...],
    layouts: list[str],
) -> Entry:
    """Return the table's entry for a shape and a number of rows per expert.

    Raises:
        SystemExit: no candidate of a kernel fits, or a layer with the fastest ones is wrong.
    """
    E = shape.experts
    tokens = rows * E // shape.top_k
    batches = [inputs(shape, tokens, popularity("uniform", E), device) for _ in range(scale.sets)]
    bank = make_bank(*weights(shape, device), select(batches[0].index, E, 0.1))
    best: tuple[float, Entry] | None = None
    for block_m in blocks:
        left = fitting(arch, shape, rows, block_m, candidates, layouts)
        empty = [name for name, listed in left.items() if not listed]
        if empty:
            print(f"block_m {block_m}: nothing fits for {', '.join(empty)}", flush=True)
            continue
        fastest: dict[str, tuple[float, Tiles]] = {}
        for pack in in_packs(left):
            for name, ms in _times(batches, bank, config.Config(block_m, pack), device, scale):
                if name not in fastest or ms < fastest[name][0]:
                    fastest[name] = (ms, pack[name])
        total = sum(ms for ms, _ in fastest.values())
        print(f"block_m {block_m}: {total:.4g} ms,", fastest, flush=True)
        if best is None or total < best[0]:
            best = (total, {"block_m": block_m, **{k: tiles for k, (_, tiles) in fastest.items()}})
    if best is None:
        raise SystemExit("no candidates fit")
    entry = {"H": shape.hidden, "I": shape.inner, "rows": rows, "itemsize": 2, **best[1]}
    tiles = config.Config(entry["block_m"], {name: entry[name] for name in config.KERNELS})
    with using(tiles), poisoned():
        found = results(tiled.moe_mlp, batches[0], bank)
    expected = results(grouped.moe_mlp, batches[0], bank)
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        if not error(a, b) < BOUND[device.type]:
            raise SystemExit(f"{entry}: {name} is wrong, relative error {error(a, b):.3g}")
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return entry | {"source": f"measured {date}, {card(device)}"}


def _times(
    batches: list[Inputs],
    bank: esft_kernels.ExpertBank,
    tiles: config.Config,
    device: torch.device,
    scale: Scale,
) -> list[tuple[str, float]]:
    """Return each kernel's time in a layer, in ms: the sum over its launches."""
    total = dict.fromkeys(config.KERNELS, 0.0)
    for launch, run in kernel_runs(batches, bank, tiles).items():
        name = launch.split()[0]
        if name not in total:
            continue  # route has no tile sizes

        def once(i: int, lap: Lap, run=run) -> None:
            run(i % len(batches))
            lap()

        total[name] += middle(measure(once, device, scale)[0])
    return list(total.items())


def write(path: Path, entry: Entry) -> None:
    """Put an entry into a table, in the place of the one for the same layer."""
    table = json.loads(path.read_text(encoding="utf-8"))

    def key(e: Entry) -> tuple[int, ...]:
        return (e["itemsize"] == 4, e["H"], e["I"], e["rows"])

    entries = [e for e in table["entries"] if key(e) != key(entry)] + [entry]
    lines = ",\n    ".join(json.dumps(e) for e in sorted(entries, key=key))
    text = f'{{\n  "source": {json.dumps(table["source"])},\n  "entries": [\n    {lines}\n  ]\n}}\n'
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Tune what there is time for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=FULL.shapes, default=list(FULL.shapes))
    parser.add_argument("--rows", nargs="+", type=int, help=f"per expert; default {ROWS}")
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the tables")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    args = parser.parse_args()
    device, scale = pick_device(args.smoke), SMOKE if args.smoke else FULL
    arch = "sm_90"
    if not args.smoke:
        arch = config.architecture(torch.cuda.get_device_capability(device))
    candidates = SMOKE_CANDIDATES if args.smoke else CANDIDATES
    blocks = SMOKE_BLOCK_M if args.smoke else BLOCK_M
    layouts = ["plain"] if args.smoke else ["plain", "interleaved", "generic"]
    end = time.monotonic() + 60 * args.minutes
    torch.manual_seed(0)
    for model in args.models:
        for rows in args.rows or (SMOKE_ROWS if args.smoke else ROWS):
            if time.monotonic() > end:
                print(f"left out: {model}, {rows} rows per expert", flush=True)
                continue
            entry = tune(
                arch, scale.shapes[model], rows, device, scale, candidates, blocks, layouts
            )
            write(args.configs / f"{arch}.json", entry)
            print(model, json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()

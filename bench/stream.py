"""What does `esft profile --stream` cost, in time and memory?

    python bench/stream.py --folder /tmp/stream
    python bench/stream.py --folder /data/stream --larger-than-memory

The first takes a checkpoint that fits, and compares streaming it with having all of it in memory,
in pairs. The second makes one that does not fit: 1.25 times the machine's memory, or `--size`, so
the folder's disk needs that much. Either makes a random Qwen3-MoE in bfloat16, shard by shard, and
leaves it in the folder for the next run; it needs no more memory itself than two of its layers.

Each measurement is a process of its own. Before one that reads, the checkpoint is put out of the
page cache. What is printed is Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from esft.data.example import Example
from esft.loading import load_model
from esft.plans.memory_size import memory_bytes
from esft.profiling import aligned, profile_model, tokens_at_once
from esft.report import numerals
from esft.shard_writer import Source, write_shards
from esft.shards import open_checkpoint, read_blocks
from esft.streaming.profiled import profile_streamed
from esft.tally import WHOLE

HIDDEN, INNER, EXPERTS, TOP_K, VOCAB = 1024, 512, 128, 8, 8192
LAYER = 2 * EXPERTS * 3 * HIDDEN * INNER  # about the bytes of a layer: 403 MB
SEQ_LEN = 512
SPREAD = 0.02  # of the weights: hidden states stay finite through any number of layers
ROOM = 64 << 20  # random bytes from which the weights are cut
CPU = torch.device("cpu")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are made")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--size", help="of the checkpoint, 30GB")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--larger-than-memory", action="store_true")
    parser.add_argument("--hidden-memory", default="2GB")
    parser.add_argument("--measure", choices=list(MEASURES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(MEASURES[options.measure](options.folder, options)))
        return
    memory = psutil.virtual_memory().total
    size = memory_bytes(options.size, "--size") if options.size else 2_500_000_000
    if options.larger_than_memory and not options.size:
        size = memory * 5 // 4
    options.folder = make_checkpoint(options.folder, max(2, round(size / LAYER)))
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s), {numerals.size(memory)} of memory, load "
        f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"computed in {options.dtype}\n"
    )
    (print_larger if options.larger_than_memory else print_pairs)(options, memory)


def print_larger(options: argparse.Namespace, memory: int) -> None:
    """Profile a checkpoint that does not fit, once."""
    found = measured("streamed", options)
    row("checkpoint", "memory", "peak of the process", "time", "read", "tokens", "tokens/s")
    row(*["---"] * 7)
    row(
        numerals.size(checkpoint_bytes(options.folder)),
        numerals.size(memory),
        numerals.size(found["peak"]),
        numerals.duration(found["seconds"]),
        numerals.size(found["read"]),
        numerals.count(options.tokens),
        numerals.count(options.tokens / found["seconds"]),
    )


def print_pairs(options: argparse.Namespace, _memory: int) -> None:
    """Compare streaming with the whole model in memory, one after the other and the other way."""
    names = ["read", "resident", "streamed"]
    runs: list[dict[str, Any]] = []
    for number in range(options.pairs):
        order = names[number % 3 :] + names[: number % 3]
        runs.append({name: measured(name, options) for name in order})
    row(numerals.size(checkpoint_bytes(options.folder)), "time", "CPU time", "peak of memory")
    row(*["---"] * 4)
    for name, what in (
        ("read", "read all files once"),
        ("resident", f"profile {options.tokens:,} tokens, all weights in memory, loading apart"),
        ("streamed", f"profile {options.tokens:,} tokens, streamed"),
    ):
        times = [
            spread([run[name][time] for run in runs], numerals.duration)
            for time in ("seconds", "cpu")
        ]
        row(what, *times, numerals.size(max(run[name]["peak"] for run in runs)))
    clock, cpu = (
        spread(
            [run["streamed"][t] / (run["read"][t] + run["resident"][t]) for run in runs],
            "{:.2f}".format,
        )
        for t in ("seconds", "cpu")
    )
    same = all(run["streamed"]["scores"] == run["resident"]["scores"] for run in runs)
    print(
        f"\nStreamed against reading once and computing: {clock} of the time, {cpu} of the CPU "
        f"time; the scores are {'the same' if same else 'NOT the same'}."
    )


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one thing in a process of its own."""
    forget(options.folder)
    arguments = ["--folder", options.folder, "--tokens", options.tokens, "--measure", name]
    arguments += ["--dtype", options.dtype, "--hidden-memory", options.hidden_memory]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Stopwatch:
    """Times from its making on, of the clock and of the processors; and the peak of memory."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, Any]:
        """Return them."""
        seconds, cpu = self._start
        return {
            "seconds": time.perf_counter() - seconds,
            "cpu": time.process_time() - cpu,
            "peak": peak(),
        }


def measure_read(folder: Path, _options: argparse.Namespace) -> dict[str, Any]:
    """Read every tensor's bytes once."""
    watch = Stopwatch()
    read = sum(
        len(block)
        for entry in open_checkpoint(folder).entries.values()
        for block in read_blocks(entry)
    )
    return {**watch.read(), "read": read}


def measure_resident(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Profile with all weights in memory; the time is that of computing."""
    model = aligned(load_model(folder, device="cpu", dtype=options.dtype))
    watch = Stopwatch()
    scores = profile_model(model, sample(options.tokens), name="random", bytes_per_parameter=2)
    return {**watch.read(), "scores": scores.to_dict()["layers"]}


def measure_streamed(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Profile layer by layer."""
    watch, before = Stopwatch(), bytes_read()
    scores = profile_streamed(
        folder,
        sample(options.tokens),
        count="all",
        cooccurrence=False,
        name="random",
        bytes_per_parameter=2,
        batch_tokens=tokens_at_once("cpu"),
        share=WHOLE,
        device=CPU,
        dtype=getattr(torch, options.dtype),
        hidden_memory=memory_bytes(options.hidden_memory, "--hidden-memory"),
    )
    return {
        **watch.read(),
        "read": bytes_read() - before,
        "scores": scores.to_dict()["layers"],
    }


MEASURES = {"read": measure_read, "resident": measure_resident, "streamed": measure_streamed}


def make_checkpoint(folder: Path, layers: int) -> Path:
    """Write a random checkpoint tensor by tensor, unless it is there; return its folder."""
    folder = folder / f"qwen3-moe-{layers}-layers"
    if (folder / "config.json").is_file():
        return folder
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    shapes = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert in range(EXPERTS):
                for part in ("gate_proj", "up_proj"):
                    key = name.replace("gate_up_proj", f"{expert}.{part}.weight")
                    shapes[key] = (INNER, HIDDEN)
        elif name.endswith("experts.down_proj"):
            for expert in range(EXPERTS):
                key = name.replace("down_proj", f"{expert}.down_proj.weight")
                shapes[key] = (HIDDEN, INNER)
        else:
            shapes[name] = tuple(value.shape)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    room = (torch.randn(ROOM // 2, generator=generator) * SPREAD).to(torch.bfloat16)
    random_bytes = room.view(torch.uint8).numpy().tobytes()
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()

    def blocks(number: int, shape: tuple[int, ...]) -> Iterator[bytes]:
        size = 2 * torch.Size(shape).numel()
        if len(shape) == 1:  # a norm
            yield ones[:size]
            return
        # Each tensor begins elsewhere in the random bytes.
        start = number * 7919 * 1024 % (ROOM // 2) // 2 * 2
        while size:
            block = random_bytes[start : start + size]
            yield block
            size -= len(block)
            start = 0

    tensors = [
        Source(
            name, "BF16", shape, 2 * torch.Size(shape).numel(), lambda n=n, s=shape: blocks(n, s)
        )
        for n, (name, shape) in enumerate(shapes.items())
    ]
    write_shards(folder, "model", tensors)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)  # last: a folder with it is complete
    return folder


def sample(tokens: int) -> list[Example]:
    """Return random rows of `SEQ_LEN` tokens."""
    ids = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    return [Example(row.tolist(), [True] * len(row), "random") for row in ids.split(SEQ_LEN)]


def checkpoint_bytes(folder: Path) -> int:
    """Return the size of the weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Put a checkpoint out of the page cache."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def peak() -> int:
    """Return the most memory that this process ever had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def spread(values: list[float], text: Any) -> str:
    """Write the median of some values, and the least and the most."""
    return f"{text(statistics.median(values))} ({text(min(values))} to {text(max(values))})"


def row(*cells: str) -> None:
    """Print a row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

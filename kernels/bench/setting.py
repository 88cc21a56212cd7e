"""What the benchmarks share: the machine in words, models with a batch, and timing in turn."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.packing import collate, pack
from esft.data.rows import read_rows
from esft.loading import DTYPES, load_model, load_tokenizer
from esft.locating import TINY_MOE, TINY_MOE_FOLDER

MODELS = (TINY_MOE, "qwen3-moe")
TASK = TINY_MOE_FOLDER / "tasks" / "swedish" / "train.jsonl"
# The shape of facts about transformers on CPUs: 216 M parameters, almost all in experts.
QWEN3: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Setting:
    """A model to load, and text for it.

    Attributes:
        name: one of `MODELS`.
        dtype: of the weights.
        batch: keyword arguments of a training step.
        sample: rows to profile.
    """

    name: str
    dtype: str
    batch: dict[str, Any]
    sample: list[Example]

    def model(self) -> PreTrainedModel:
        """Load it, or make it with the same random weights each time."""
        if self.name == TINY_MOE:
            return load_model(TINY_MOE, dtype=self.dtype, device="cpu")
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_moe", **QWEN3)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])


def setting(name: str, dtype: str = "float32") -> Setting:
    """Return tiny-moe with a task it does not know, or a random Qwen3-MoE with random text."""
    if name == TINY_MOE:
        examples = encode_rows(read_rows(TASK), load_tokenizer(TINY_MOE))
        blocks = pack(examples, 256, pad_id=0)
        return Setting(name, dtype, collate([blocks[i] for i in range(8)]), examples[:500])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, QWEN3["vocab_size"], (4, 512), generator=generator)
    text = torch.randint(5, QWEN3["vocab_size"], (8, 512), generator=generator).tolist()
    sample = [Example(row, [True] * len(row), f"row {i}") for i, row in enumerate(text)]
    return Setting(name, dtype, {"input_ids": ids, "labels": ids, "use_cache": False}, sample)


def machine() -> str:
    """Say what this runs on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next(x.split(": ")[1] for x in cpuinfo.splitlines() if x.startswith("model name"))
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, peft))
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {versions}"
    )


@dataclass(frozen=True)
class Times:
    """Seconds of one run: on the clock, and of this process on all its cores.

    On a machine with other work the second is the steadier of the two.
    """

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Times:
    """Run something and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(
    works: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 1
) -> dict[str, list[Times]]:
    """Time several things in turn (ABC, BCA, CAB, ...), so that a drift of the machine hits all."""
    names = list(works)
    found: dict[str, list[Times]] = {name: [] for name in names}
    for repeat in range(-warm_up, repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            times = timed(works[name])
            if repeat >= 0:
                found[name].append(times)
    return found


def ratio(a: list[float], b: list[float]) -> str:
    """Return the median of a/b run by run, and its range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def walls(times: list[Times]) -> list[float]:
    """Return the times on the clock."""
    return [x.wall for x in times]


def cpus(times: list[Times]) -> list[float]:
    """Return the times of this process."""
    return [x.cpu for x in times]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

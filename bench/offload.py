"""Generating with less memory than the experts take: what caching and guessing bring.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python bench/offload.py --out offload.jsonl [--cold]

The ablation of arXiv 2312.17238: the cache and speculation together, each without the other,
neither, and the loading of whole layers; beside them accelerate's offload to disk, and all experts
in memory. `tiny-moe` goes over its own held-out text; it is trained, so that its routing says
something about caching and guessing. `padded` is tiny-moe with units added to each expert that
change nothing: the same routing, with experts of 3.9 MB, so that fetching costs. The random models
of the shapes of Qwen3-MoE and Mixtral go over random tokens; what their routers do is an accident.
All are in bfloat16, and a quarter of the experts fits the budget. All ways take turns, token by
token, and medians and ratios are of tokens. Then the held-out perplexity of `tiny-moe`, its experts
in 16 to 2 bits.

Without `--cold` whatever is read comes from the system's page cache; with it the checkpoint's pages
are dropped from there before each token and every 20 ms (posix_fadvise), so that the disk is read.
Results are appended as they come, a JSON object a line.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import esft
from esft.inference import opened
from esft.loading import DTYPES
from esft.locating import resolve
from esft.offload import opening
from esft.offload.cache import ExpertCache
from esft.offload.stores import KINDS
from esft.offload.weights import Weights
from esft.weight_source import WeightSource

PROMPT, TOKENS = 32, 48  # read at once; then one by one
PADDED = 4096  # inner size of tiny-moe's experts, 32 by itself
SHARE = 4  # the budget holds one expert of so many
WHOLE = "whole layers"
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "without speculation": {"ahead": 0},
    "without the cache": {"keep": False},
    "without either": {"ahead": 0, "keep": False},
    WHOLE: {"ahead": 0, "keep": False},
}
_COMMON = {"vocab_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 512}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "qwen3_moe",
        {
            "hidden_size": 1024,
            "head_dim": 64,
            "num_attention_heads": 16,
            "num_hidden_layers": 8,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 384,
            "intermediate_size": 1024,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (
        "mixtral",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 3584,
        },
    ),
}


def random_checkpoint(folder: Path, name: str) -> Path:
    """Save a random model in bfloat16, with tiny-moe's tokenizer."""
    family, fields = SHAPES[name]
    config = AutoConfig.for_model(family, **_COMMON, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(resolve("tiny-moe")).save_pretrained(folder)
    return folder


def padded_checkpoint(folder: Path) -> Path:
    """Save tiny-moe with wider experts whose new units are 0: it computes what it computed."""
    source = WeightSource.open(resolve("tiny-moe"))
    source.fill(source.names)
    config = copy.deepcopy(source.model.config)
    config.moe_intermediate_size = PADDED
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    small = dict(source.model.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            own = small[name]
            if weight.shape == own.shape:
                weight.copy_(own)
                continue
            weight.zero_()
            if name.endswith("gate_up_proj"):
                weight, own = (t.unflatten(1, (2, -1)) for t in (weight, own))
            weight[tuple(slice(size) for size in own.shape)] = own
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(resolve("tiny-moe")).save_pretrained(folder)
    return folder


class WholeLayers(ExpertCache):
    """Reads all experts of a layer whenever it needs any, and keeps none."""

    def visit(
        self,
        layer: int,
        experts: Sequence[int],
        use: Callable[[int, Weights], None],
        meanwhile: Callable[[], None],
    ) -> None:
        """See `ExpertCache.visit`."""
        needed = set(experts)

        def use_needed(expert: int, weights: Weights) -> None:
            if expert in needed:
                use(expert, weights)

        super().visit(layer, range(self._layers[layer].num_experts), use_needed, meanwhile)


class Way:
    """One way of running a model: a token at a time, timed."""

    def __init__(self, name: str, model: Any, memory: esft.ExpertMemory | None = None) -> None:
        self.name, self.model, self.memory = name, model, memory
        self.past: Any = None
        self.seconds: list[float] = []

    def step(self, ids: torch.Tensor) -> None:
        """Go on with a few tokens `[1, S]`."""
        began = time.perf_counter()
        with torch.no_grad():
            output = self.model(input_ids=ids, past_key_values=self.past, use_cache=True)
        self.seconds.append(time.perf_counter() - began)
        self.past = output.past_key_values

    def figures(self) -> dict[str, Any]:
        """Return what was counted so far."""
        return {} if self.memory is None else self.memory.figures.to_dict()


class Pages:
    """Keeps files out of the page cache, if wanted."""

    def __init__(self, folders: Sequence[Path], cold: bool) -> None:
        found = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        self._files = [os.open(file, os.O_RDONLY) for file in found] if cold else []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Drop what is cached now."""
        for file in self._files:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Leave the files alone again."""
        self._over.set()
        self._thread.join()
        for file in self._files:
            os.close(file)

    def _run(self) -> None:
        while self._files and not self._over.wait(0.02):
            self.drop()


@contextmanager
def ways(folder: Path, dtype: torch.dtype, budget: int, spill: Path) -> Iterator[list[Way]]:
    """Open a model in every way."""
    with ExitStack() as stack:
        found = []
        for name, options in VARIANTS.items():
            whole = name == WHOLE
            opening.ExpertCache = WholeLayers if whole else ExpertCache  # type: ignore[misc]
            memory = esft.ExpertMemory(budget, **options)
            name_of = str(dtype).removeprefix("torch.")
            model, _ = stack.enter_context(opened(folder, dtype=name_of, expert_memory=memory))
            found.append(Way(name, model, memory))
        opening.ExpertCache = ExpertCache  # type: ignore[misc]
        found.append(Way("accelerate, disk", with_accelerate(folder, dtype, spill)))
        resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        found.append(Way("all in memory", resident))
        yield found


def with_accelerate(folder: Path, dtype: torch.dtype, spill: Path) -> Any:
    """Load a model whose layers' experts accelerate keeps on disk, a layer's at a time."""
    source = WeightSource.open(folder, dtype)
    experts = {layer.name for layer in source.layers}
    rest = {name.rpartition(".")[0] for name in source.model.state_dict()} - experts
    places = dict.fromkeys(sorted(rest), "cpu") | dict.fromkeys(sorted(experts), "disk")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=places, offload_folder=spill
    ).eval()


def text_of(name: str) -> torch.Tensor:
    """Return the tokens that a model goes over: `[1, PROMPT + TOKENS]`."""
    if name in SHAPES:  # tiny-moe's tokenizer has 2,048 tokens
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, 2000, (1, PROMPT + TOKENS), generator=generator)
    folder = resolve("tiny-moe")
    rows = (folder / "heldout" / "prose.jsonl").read_text(encoding="utf-8").splitlines()
    text = "".join(row["prompt"] + row["completion"] for row in map(json.loads, rows))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return ids[:, : PROMPT + TOKENS]


def ablation(
    name: str, folder: Path, dtype: torch.dtype, cold: bool, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of running one model."""
    source = WeightSource.open(folder, dtype)
    total = sum(source.shape(n).numel() for n in source.expert_names) * dtype.itemsize
    ids, spill = text_of(name), scratch / "accelerate"
    with ways(folder, dtype, total // SHARE, spill) as found:
        for way in found:
            way.step(ids[:, :PROMPT])
        before = {way.name: way.figures() for way in found}
        pages = Pages([folder, spill], cold)
        for place in range(PROMPT, PROMPT + TOKENS):
            for way in found:
                pages.drop()
                way.step(ids[:, place : place + 1])
        pages.close()
        first = found[0].seconds[1:]
        for way in found:
            after, own = way.figures(), way.seconds[1:]
            row = {
                "model": name,
                "dtype": str(dtype).removeprefix("torch."),
                "cold": cold,
                "experts": total,
                "budget": total // SHARE,
                "way": way.name,
                "tokens_per_second": 1 / statistics.median(own),
                "speed_of_full": statistics.median(
                    one / other for one, other in zip(first, own, strict=True)
                ),
            }
            if after:
                moved = after["bytes_moved"] - before[way.name]["bytes_moved"]
                written = after["written"]
                row |= {"bytes_a_token": moved // TOKENS}
                row |= {key: written[key] for key in ("hit_rate", "recall", "staged_rate")}
            yield row


def perplexities() -> Iterator[dict[str, Any]]:
    """Yield a row for each kind of storage: tiny-moe on its held-out text."""
    heldout = resolve("tiny-moe") / "heldout"
    first = min(heldout.glob("*.jsonl"))
    for bits, kind in ((16, None), (8, "int8"), (4, "int4"), (4, "nf4"), (3, "int3"), (2, "int2")):
        if kind is not None:
            KINDS[bits] = kind
        memory = esft.ExpertMemory("1GB", bits=bits)
        found = esft.evaluate("tiny-moe", first, general=heldout, expert_memory=memory)
        assert found.general_loss is not None
        yield {
            "model": "tiny-moe",
            "bits": bits,
            "kind": kind,
            "loss": found.general_loss,
            "perplexity": math.exp(found.general_loss),
            "store_bytes": memory.figures.store_bytes,
        }


def main() -> None:
    """Run everything, printing and writing each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended there")
    parser.add_argument("--models", nargs="*", default=["tiny-moe", "padded", *SHAPES])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--cold", action="store_true", help="read from the disk, not its cache")
    parser.add_argument("--no-bits", action="store_true", help="leave out the perplexities")
    args = parser.parse_args()

    def told(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    for name in args.models:
        with tempfile.TemporaryDirectory(prefix="esft-bench-") as scratch:
            folder = Path(scratch) / "model"
            if name in SHAPES:
                random_checkpoint(folder, name)
            elif name == "padded":
                padded_checkpoint(folder)
            else:
                folder = resolve(name)
            dtype = DTYPES[args.dtype]
            for row in ablation(name, folder, dtype, args.cold, Path(scratch)):
                told(row)
    if not args.no_bits:
        for row in perplexities():
            told(row)


if __name__ == "__main__":
    main()

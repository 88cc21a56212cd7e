"""Streamed and resident profiles of one saved checkpoint, and ways to stop the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from esft.data.example import Example
from esft.loading import auto_class, load_config
from esft.moe import anatomy
from esft.profiling import profile_model
from esft.progress import SILENT, Reporter, Task
from esft.scores import Scores
from esft.streaming.partial import Partial
from esft.streaming.streamed import Streamed, run_streamed
from esft.tally import Tally
from esft.weight_source import WeightSource
from tests.families import CONFIGS, SIZES
from tests.models_of_ours.tiny_models import NAMES as OURS
from tests.models_of_ours.tiny_models import tiny as tiny_of_ours
from tests.test_families import model_of

CPU = torch.device("cpu")
IN_MEMORY = 10**9
BATCH = 40  # tokens: the rows below make four batches, one of them padded
# Experts of later layers read the keys and values of earlier ones.
LOOKS_BACK = "gemma4_text, shared keys"


def save(folder: Path, family: str) -> Path:
    """Save a random bfloat16 model in small shards."""
    if family == LOOKS_BACK:
        model = _with_shared_keys()
    else:
        model = tiny_of_ours(family) if family in OURS else model_of(family)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def rows(lengths: Sequence[int] = (5, 21, 34, 2, 21)) -> list[Example]:
    """Rows of random tokens."""
    tokens = torch.randint(3, 64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return [
        Example(row.tolist(), [place % 3 == 0 for place in range(len(row))], f"rows:{number}")
        for number, row in enumerate(tokens.split(list(lengths)), start=1)
    ]


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> Scores:
    """Profile with all weights in memory, each where the allocator puts it."""
    config = load_config(folder)
    model = auto_class(config).from_pretrained(folder, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return profile_model(
        model,
        rows(),
        count="prompt",
        cooccurrence=True,
        name="it",
        bytes_per_parameter=2,
        batch_tokens=BATCH,
    )


def streamed(
    folder: Path,
    *,
    hidden_memory: int = IN_MEMORY,
    partial: Path | None = None,
    about: str = "",
    dtype: torch.dtype = torch.float32,
    reporter: Reporter = SILENT,
) -> tuple[Scores, Streamed]:
    """Profile the same way, layer by layer."""
    source = WeightSource.open(folder, dtype)
    tally = Tally(anatomy(source.model), rows(), "prompt", cooccurrence=True)

    def run(kept: Partial | None) -> Streamed:
        return run_streamed(
            source,
            tally,
            list(tally.batches(BATCH)),
            device=CPU,
            hidden_memory=hidden_memory,
            partial=kept,
            reporter=reporter,
        )

    if partial is None:
        found = run(None)
    else:
        with Partial.opened(partial, {"about": about}) as kept:
            found = run(kept)
    assert all(p.device.type == "meta" for p in source.model.parameters())
    return tally.scores("it", 2), found


class Watching:
    """A reporter that keeps the notes, and does something after a layer."""

    def __init__(self, layers: int = 0, then: Callable[[], Any] = lambda: None) -> None:
        self.notes: list[str] = []
        self._left, self._then = layers, then

    def note(self, text: str) -> None:
        """Keep a line."""
        self.notes.append(text)

    def task(self, title: str, total: int, unit: str) -> Task:
        """Open a task that counts the layers done by this process."""
        watching = self

        class Layers(Task):
            def advance(self, units: int = 1, tokens: int = 0, **figures: float) -> None:
                watching._left -= units
                if units and not watching._left:
                    watching._then()

        assert (title, unit) == ("profiling", "layer")
        return Layers()


def interrupt() -> None:
    """Do as a user who presses Ctrl-C."""
    raise KeyboardInterrupt


def _with_shared_keys() -> PreTrainedModel:
    fields = SIZES | CONFIGS["gemma4_text"]
    fields |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    fields |= {"vocab_size_per_layer_input": 64}
    fields |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = AutoConfig.for_model("gemma4_text", **fields)
    model = auto_class(config).from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise + (parameter.dim() == 1)).to(torch.bfloat16)
    return model

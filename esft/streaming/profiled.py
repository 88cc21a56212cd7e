"""`esft profile` of a checkpoint that does not fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

import esft
from esft.data.example import Example
from esft.files import sha256_file
from esft.loading import check_loadable
from esft.moe import anatomy
from esft.progress import SILENT, Reporter
from esft.scores import Scores
from esft.streaming.available import available_memory
from esft.streaming.partial import Partial
from esft.streaming.streamed import run_streamed
from esft.tally import Share, Tally
from esft.weight_source import WeightSource

_HIDDEN = 4  # one part in so many of the free memory is for what batches hold between layers


def profile_streamed(
    folder: Path,
    examples: Sequence[Example],
    *,
    count: str,
    cooccurrence: bool,
    name: str,
    bytes_per_parameter: int | None,
    batch_tokens: int,
    share: Share,
    device: torch.device,
    dtype: torch.dtype | str,
    hidden_memory: int | None = None,
    partial: Path | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score the experts of a checkpoint with two of its layers in memory at a time.

    The scores are those of `esft.profiling.profile_model`, in float32 to the last bit.

    Args:
        folder: of the checkpoint.
        examples: the sample.
        count: see `profile_model`.
        cooccurrence: see `profile_model`.
        name: what the scores call the model.
        bytes_per_parameter: of the checkpoint; None takes those that are computed with.
        batch_tokens: padded tokens in a batch at most, but at least one row.
        share: what this process takes of the sample; the joined ones add theirs up.
        device: that computes.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        hidden_memory: bytes that batches may hold in memory between two layers, on a CPU; None
            takes a quarter of what is free.
        partial: folder for what it takes to go on after an interruption; an earlier profile of the
            same goes on from there. Stays, for the caller to delete once the scores are safe.
        reporter: shown the progress.

    Raises:
        ModelError: the model cannot be loaded or profiled, or one of its files is missing or
            damaged, when it is read.
        OutputError: what batches hold cannot be written.
        DataError: no token counts.
    """
    check_loadable(folder)
    source = WeightSource.open(folder, dtype)
    tally = Tally(anatomy(source.model), examples, count, cooccurrence=cooccurrence)
    if hidden_memory is None:
        hidden_memory = available_memory(torch.device("cpu")) // _HIDDEN
    about = {
        **_about(source, examples),
        "count": count,
        "cooccurrence": cooccurrence,
        "batch tokens": batch_tokens,
        "share": list(share),
        "device": str(device),
    }
    with nullcontext() if partial is None else Partial.opened(partial, about) as kept:
        run_streamed(
            source,
            tally,
            list(tally.batches(batch_tokens, share)),
            device=device,
            hidden_memory=hidden_memory,
            partial=kept,
            reporter=reporter,
        )
    tally.add_up()
    return tally.scores(name, bytes_per_parameter or source.model.dtype.itemsize)


def _about(source: WeightSource, examples: Sequence[Example]) -> dict[str, Any]:
    """Say what is profiled and with what: as far as the bits of the scores depend on it."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.input_ids, example.completion)).encode())
    files = [(file.name, file.stat()) for file in source.checkpoint.files]
    return {
        "model": sha256_file(source.folder / "config.json"),
        # Their content would take as long to hash as to profile.
        "weights": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
        "sample": digest.hexdigest(),
        "dtype": str(source.model.dtype),
        "threads": torch.get_num_threads(),
        "versions": [esft.__version__, torch.__version__, transformers.__version__],
    }

"""Profile a model on a task: which experts its routers choose, and with what gate values."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from esft.data.bad_rows import STRICT, BadRows
from esft.data.encode import Example, encode_rows
from esft.data.packing import sample
from esft.data.row import Row
from esft.data.rows import read_rows
from esft.data.sources import Source
from esft.errors import DataError
from esft.loading import (
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from esft.locating import resolve
from esft.moe import anatomy, moe_layers, text_config
from esft.plans.memory_size import memory_bytes
from esft.processes import as_one, gathered, is_main, rank
from esft.processes import count as processes
from esft.progress import SILENT, Reporter
from esft.scores import Scores
from esft.streaming.available import too_large
from esft.streaming.partial import Partial, partial_folder
from esft.streaming.profiled import profile_streamed
from esft.tally import COUNTS, WHOLE, Share, Tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 131_072  # the paper's sample: 32 sequences of 4,096 tokens
SEQ_LEN = 4096

# Padded tokens in a batch: enough to keep the machine busy.
_BATCH_TOKENS = {"cpu": 8192}
_BATCH_TOKENS_GPU = 32_768
_ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
_ROWS_ENCODED = 1000  # at a time, until the sample has its tokens


@as_one("profile")
def profile(
    model: str | Path,
    data: str | Path | Source,
    *,
    tokens: int = TOKENS,
    seq_len: int = SEQ_LEN,
    seed: int = 0,
    count: str = "all",
    cooccurrence: bool = False,
    bad_rows: BadRows = STRICT,
    device: str | None = None,
    dtype: str = "auto",
    stream: bool | None = None,
    hidden_memory: str | int | None = None,
    out: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score how much a task uses each routed expert of a model.

    Launched as several processes (torchrun, accelerate launch), each takes a share of the sample,
    and all get the same scores, to the last bit those of one process.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        data: the task set, see `esft.data.rows.read_rows`.
        tokens: size of the sample; rows are drawn until they have this many tokens together.
        seq_len: longer rows are cut to this many tokens, or to what the model can take.
        seed: of the sample.
        count: which tokens count: `all`, or only those of the `prompt` or the `completion`.
        cooccurrence: also count how often two experts of a layer serve the same token.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: of the weights in memory, see `esft.loading.pick_dtype`.
        stream: whether to have only two layers in memory at a time, read from disk as they are
            needed; the scores are the same. None does so where the weights would not fit.
        hidden_memory: while streaming, what the sample may take in memory between two layers,
            `4GB`; the rest waits in a file. None takes a quarter of the free memory.
        out: also write the scores to this file. A streamed profile keeps what is done beside it,
            in `OUT.partial/`, until then; if it is interrupted, the next call goes on from there.
        reporter: shown the progress.

    Raises:
        ModelError: the model cannot be loaded, is dense, or is of a family that cannot be profiled.
        DataError: the data cannot be read (`file:line: reason`), or no token counts.
        OutputError: a file cannot be written.
        EsftError: `hidden_memory` is no amount of memory.
    """
    _check(count, tokens, seq_len)
    hidden = None if hidden_memory is None else memory_bytes(hidden_memory, "--hidden-memory")
    source = data if isinstance(data, Source) else Source(str(data))
    rows = read_rows(source, bad_rows=bad_rows, reporter=reporter)
    folder = resolve(model)
    # Loading weights may take minutes: what can fail before it, fails before it.
    skeleton = load_skeleton(folder)
    moe_layers(skeleton)
    seq_len = context_length(skeleton, seq_len)
    examples = sample_rows(
        rows,
        load_tokenizer(folder),
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        bad_rows=bad_rows,
    )
    common: dict[str, Any] = {
        "count": count,
        "cooccurrence": cooccurrence,
        "name": str(model),
        "bytes_per_parameter": stored_bytes(folder),
        "reporter": reporter,
    }
    place = pick_device(device)
    if stream is None:
        own = too_large(skeleton, pick_dtype(dtype, place), place, reporter)
        stream = any(gathered(own, "profile"))  # all alike, whatever memory each finds free
    if stream:
        scores = profile_streamed(
            folder,
            examples,
            batch_tokens=tokens_at_once(place.type),
            share=Share(rank(), processes()),
            device=place,
            dtype=pick_dtype(dtype, place),
            hidden_memory=hidden,
            partial=None if out is None else partial_folder(Path(out)),
            **common,
        )
    else:
        loaded = aligned(load_model(folder, device=device, dtype=dtype))
        scores = profile_model(loaded, examples, split=True, **common)
    drawn = {"data": source.path, "seq_len": seq_len, "seed": seed}
    scores = replace(scores, sample=scores.sample | drawn)
    if out is not None:
        if is_main():
            scores.write(Path(out))
        if stream:
            Partial.remove(partial_folder(Path(out)))
    return scores


def profile_model(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    count: str = "all",
    cooccurrence: bool = False,
    name: str | None = None,
    bytes_per_parameter: int | None = None,
    batch_tokens: int | None = None,
    split: bool = False,
    reporter: Reporter = SILENT,
) -> Scores:
    """Score the routed experts of a model in memory; it may have a selection attached.

    Scores are means over all counted tokens of all examples:
    `gate[i] = sum_t g[t,i] / T` and `token[i] = count_i / (K * T)` (arXiv 2407.01906), summed in
    float64; `g` is the weight that the experts get, before a constant `routed_scaling_factor`.
    How rows are put into batches changes nothing but the order of that sum.

    Args:
        model: left as it was, but for the mode: it is put into evaluation mode meanwhile.
        examples: the sample.
        count: which tokens count: `all`, or only those of the `prompt` or the `completion`.
        cooccurrence: also count how often two experts of a layer serve the same token.
        name: what the scores call the model.
        bytes_per_parameter: of the checkpoint, see `stored_bytes`; None takes those in memory.
        batch_tokens: padded tokens in a batch at most, but at least one row.
        split: whether the joined processes share the sample out; all must call this, each with a
            whole model of its own, and all get the same scores, to the last bit those of one.
        reporter: shown the progress.

    Raises:
        ModelError: the model is dense, or a router does not choose K of E experts for each token.
        DataError: no token counts.
    """
    _check(count)
    tally = Tally(anatomy(model), examples, count, cooccurrence=cooccurrence)
    device = model.device
    size = batch_tokens or tokens_at_once(device.type)
    with as_one("profile") if split else nullcontext():
        share = Share(rank(), processes()) if split else WHOLE
        with (
            evaluating(model),
            tally.hooked(),
            reporter.task("profiling", total=tally.rows(size, share), unit="row") as task,
        ):
            for batch in tally.batches(size, share):
                tally.begin(batch, device)
                # The base model: no logits, which cost more than the experts in a small model.
                model.base_model(**batch.inputs(device))
                task.advance(len(batch.rows), tokens=batch.tokens)
        if split:
            tally.add_up()
    return tally.scores(
        name or model.config._name_or_path or type(model).__name__,
        bytes_per_parameter or model.dtype.itemsize,
    )


def sample_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    bad_rows: BadRows = STRICT,
) -> list[Example]:
    """Draw a seeded sample of rows, turning no more of them into tokens than it needs.

    Args:
        rows: of a task set.
        tokenizer: the model's.
        tokens: rows are drawn until they have this many together.
        seq_len: longer rows are cut to this many tokens.
        seed: of the order; the same seed and rows give the same sample.
        bad_rows: collects rows that cannot be used, if any may be skipped.

    Raises:
        DataError: a row cannot be turned into tokens.
    """
    shuffled = random.Random(seed).sample(rows, len(rows))
    examples: list[Example] = []
    budget = tokens
    for start in range(0, len(shuffled), _ROWS_ENCODED):
        if budget <= 0:
            break
        chunk = shuffled[start : start + _ROWS_ENCODED]
        encoded = encode_rows(chunk, tokenizer, check_end=False, bad_rows=bad_rows)
        budget -= sum(min(len(example.input_ids), seq_len) for example in encoded)
        examples += encoded
    return sample(examples, tokens, seed, seq_len=seq_len)


def context_length(model: PreTrainedModel, seq_len: int) -> int:
    """Return `seq_len`, or the most tokens that the model can take if that is less."""
    return min(seq_len, getattr(text_config(model), "max_position_embeddings", seq_len))


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """Let every weight on the CPU begin where the allocator would put it, one after another.

    Weights in the dtype of their file are views of it, wherever they lie in there, and a product's
    last bit can depend on that.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()
    return model


def tokens_at_once(device: str) -> int:
    """Return how many tokens, padding included, are profiled in one batch on a type of device."""
    return _BATCH_TOKENS.get(device, _BATCH_TOKENS_GPU)


def stored_bytes(folder: Path) -> int | None:
    """Return the bytes of a parameter in a checkpoint, which a model in memory may not tell.

    None where the checkpoint's configuration does not name a dtype.
    """
    dtype = getattr(load_config(folder).get_text_config(), "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None


def _check(count: str, tokens: int = TOKENS, seq_len: int = SEQ_LEN) -> None:
    if count not in COUNTS:
        raise DataError(f'--count "{count}": choose one of {", ".join(COUNTS)}')
    for option, value in (("--tokens", tokens), ("--seq-len", seq_len)):
        if value < 1:
            raise DataError(f"{option} {value}: must be at least 1")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients, while the block runs."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)

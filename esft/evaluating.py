"""A model on a test set: its answers by every metric, and what it has kept of other domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.data.bad_rows import STRICT, BadRows
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.data.sources import Source
from esft.errors import DataError
from esft.inference import opened
from esft.loading import load_tokenizer
from esft.locating import resolve
from esft.measures.domains import domains
from esft.measures.general import domain_losses, mean
from esft.measures.metric import check_metrics
from esft.measures.task import Task, TaskScores
from esft.offload.expert_memory import ExpertMemory
from esft.progress import SILENT, Reporter


@dataclass(frozen=True)
class Evaluated(TaskScores):
    """What `evaluate` found.

    Attributes:
        general: loss on each other domain, in nats a token; None if none was given.
        offload: figures of the experts that were fetched, see
            `esft.offload.figures.OffloadFigures.to_dict`; None if all were in memory.
    """

    general: dict[str, float] | None = None
    offload: dict[str, Any] | None = None

    @property
    def general_loss(self) -> float | None:
        """Mean loss over the other domains."""
        return mean(self.general) if self.general else None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description, without the answers."""
        found = super().to_dict()
        if self.general:
            found |= {"general": self.general, "general_loss": self.general_loss}
        if self.offload is not None:
            found["offload"] = self.offload
        return found


def evaluate(
    model: str | Path,
    data: str | Path | Source,
    *,
    delta: str | Path | None = None,
    metrics: Sequence[str] = ("exact_match",),
    max_new_tokens: int = 64,
    general: str | Path | Mapping[str, Source] | None = None,
    allow_code: bool = False,
    code_seconds: float = 10.0,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = 4096,
    max_rows: int | None = None,
    expert_memory: str | int | ExpertMemory | None = None,
    bad_rows: BadRows = STRICT,
    reporter: Reporter = SILENT,
) -> Evaluated:
    """Score a model on a test set.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        data: a test set, see `esft.data.rows.read_rows`.
        delta: folder of a delta made from this model.
        metrics: by name, see `esft.measures.metric`; more than exact match have the model write its
            answers.
        max_new_tokens: of an answer at most, where one is written.
        general: other domains, see `esft.measures.domains.domains`.
        allow_code: whether code that the model writes may be run, in a sandbox: `pass_at_1`.
        code_seconds: that one answer's code, and its tests, may take.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: see `esft.loading.pick_dtype`.
        batch_tokens: see `esft.evaluation.score_rows`.
        max_rows: score only the first rows of the set, and of each other domain.
        expert_memory: bytes that the routed experts may take, such as `2GB`, or an `ExpertMemory`;
            None has them all in memory.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        reporter: shows progress.

    Raises:
        DataError: a row cannot be used; the message names file and line.
        ModelError: the model cannot be loaded, or its logits are not finite.
        DeltaError: the delta is damaged.
        CheckError: the delta was made from another base.
        EsftError: a metric is unknown or needs a library that is not installed, or code may not
            be run.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"--max-rows {max_rows}: expected at least 1")
    check_metrics(metrics, allow_code=allow_code, where="--metric")
    memory = None if expert_memory is None else ExpertMemory.of(expert_memory)
    # First: a bad line shows at once, loading takes a while.
    rows = read_rows(data, bad_rows=bad_rows, reporter=reporter)[:max_rows]
    others = {
        name: read_rows(source, bad_rows=bad_rows, reporter=reporter)[:max_rows]
        for name, source in (domains(general) if general is not None else {}).items()
    }
    tokenizer = load_tokenizer(resolve(model))
    examples, *other_examples = (
        encode_rows(found, tokenizer, check_end=False, bad_rows=bad_rows, reporter=reporter)
        for found in (rows, *others.values())
    )
    skipped = {row["where"] for row in bad_rows.skipped}
    task = Task(
        [row for row in rows if row.where not in skipped],
        examples,
        tokenizer,
        metrics=metrics,
        max_new_tokens=max_new_tokens,
        allow_code=allow_code,
        code_seconds=code_seconds,
    )
    with opened(
        model,
        delta=delta,
        device=device,
        dtype=dtype,
        expert_memory=memory,
        reporter=reporter,
    ) as (loaded, _):
        found = task.score(loaded, batch_tokens=batch_tokens, reporter=reporter)
        losses = domain_losses(
            loaded,
            dict(zip(others, other_examples, strict=True)),
            batch_tokens=batch_tokens,
            reporter=reporter,
        )
    return Evaluated(
        **vars(found),
        general=losses or None,
        offload=None if memory is None else memory.figures.to_dict(),
    )

"""The model card of a delta, as the hub reads one: metadata in front, then what was done."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from esft.data.sources import is_local
from esft.manifest import ADAPTER, versions
from esft.recipe_sections import Recipe, SelectionSpec, SourceSpec, TrainSpec
from esft.report.base_card import TAGS, BaseCard, cell, shown_path
from esft.report.card_sections import (
    BELONGS,
    ESFT,
    EXPERTS,
    TRAINING,
    USE,
    VERSIONS,
    front_matter,
    render,
    rule_words,
)
from esft.trained_parts import TrainedParts

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from esft.run.result import RunResult
    from esft.selection import Selection

_WHAT = {
    "esft": f"What {ESFT} changed in %s",
    "random": f"A control for {ESFT}: what training experts drawn by chance changed in %s",
    "lora": "A LoRA adapter, in PEFT's format, for %s",
    "hot-lora": "Low-rank factors of the experts that a task uses most, for %s",
    "full": "What full fine-tuning made of %s",
}
_TITLES = {
    "esft": "ESFT",
    "random": "random experts",
    "lora": "LoRA",
    "hot-lora": "hot-expert LoRA",
}
_HEAD = f"""\
{{{{ front }}}}
# {{{{ base.name | cell }}}}, specialised by {{{{ title }}}}

{{{{ what }}}}: {{{{ "{{:,}}".format(result.trained) }}}} parameters trained, \
{{{{ "%.1f" % (100 * result.trained / result.total) }}}} % of the model's \
{{{{ "{{:,}}".format(result.total) }}}}. {BELONGS}

"""
_RESULTS = """\
{% if results or general -%}
## Results

| | | 95 % interval | rows |
|---|---|---|---|
{% for row in results -%}
| {{ row | map("cell") | join(" | ") }} |
{% endfor -%}
{% for domain, loss in general.items() -%}
| loss on other text: {{ domain | cell }} | {{ "%.4f" % loss }} | | |
{% endfor %}
Losses are in nats a token. Intervals are bootstrapped over rows.

{% endif -%}
"""


def delta_card(
    recipe: Recipe,
    result: RunResult,
    selection: Selection | None,
    *,
    base: BaseCard,
    arguments: TrainingArguments,
    data: Mapping[str, Any],
) -> str:
    """Return the model card of a run's delta: Markdown with YAML in front.

    It is made to be shown to others: of files that are not on the hub it has the last part of the
    name and the sha256, and nothing in it is a secret.

    Args:
        recipe: of the run.
        result: of the run.
        selection: the experts that trained, if any were selected.
        base: what may be said of it.
        arguments: of the training loop.
        data: identities of the data by set, as `esft.run.task_data.data_identity` returns them.
    """
    train = recipe.train or TrainSpec()
    parts = TrainedParts.of(selection, **train.parts).names if recipe.trains_experts else ()
    return render(
        _HEAD + USE + _RESULTS + TRAINING + EXPERTS + VERSIONS,
        front=_front(recipe, result, base),
        base=base,
        result=result,
        method=result.method,
        title=_TITLES.get(result.method, "full fine-tuning"),
        what=_WHAT[result.method] % cell(base.name),
        switches=result.method in ("esft", "random") and not parts,
        adapter=(result.delta / ADAPTER).is_file(),
        results=list(_results(recipe, result)),
        general=result.general or {},
        settings=list(_settings(recipe, result, parts, arguments, data)),
        selection=selection,
        rule="" if selection is None else _rule(selection, recipe),
        versions=versions(),
    )


def _front(recipe: Recipe, result: RunResult, base: BaseCard) -> str:
    relation = "finetune" if result.method == "full" else "adapter"
    is_adapter = (result.delta / ADAPTER).is_file()
    hub = [source.path for source in recipe.data.sources("train") if _on_hub(source)]
    found: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "esft",
        "tags": TAGS + ([result.method] if "lora" in result.method else []),
        "model_name": f"{base.name.rpartition('/')[2]}-{result.method}",
        **base.metadata(relation),
    }
    if hub:
        found["datasets"] = list(dict.fromkeys(hub))
    if evaluated := _evaluated(recipe, result, base):
        found["eval_results"] = evaluated
    return front_matter(**found)


def _evaluated(recipe: Recipe, result: RunResult, base: BaseCard) -> list[Any]:
    """Return the scores on the test set as the hub keeps them."""
    from huggingface_hub import EvalResult

    if result.test is None:
        return []
    sources = recipe.data.sources("test")
    first = sources[0]
    name = ", ".join(shown_path(source.path) for source in sources)
    return [
        EvalResult(
            task_type=base.pipeline_tag or "text-generation",
            # The hub takes the id of a data set, or one word.
            dataset_type=first.path if _on_hub(first) else re.sub(r"[^\w.-]+", "-", name),
            dataset_name=name,
            dataset_config=first.config,
            dataset_split=first.split,
            metric_type=metric,
            metric_value=score.value,
        )
        for metric, score in result.test.scores.items()
    ]


def _results(recipe: Recipe, result: RunResult) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows of the table of results: what, value, interval, rows."""
    if result.test is not None:
        where = ", ".join(shown_path(source.path) for source in recipe.data.sources("test"))
        for metric, score in result.test.scores.items():
            between = f"{score.low:.4g} to {score.high:.4g}"
            yield f"{metric} on {where}", f"{score.value:.4g}", between, f"{result.test.rows:,}"
        yield f"loss on {where}", f"{result.test.loss:.4f}", "", f"{result.test.rows:,}"
    if result.evaluation is not None:
        rows = f"{result.evaluation.rows:,}"
        yield "exact_match on validation rows", f"{result.evaluation.exact_match:.4g}", "", rows
        yield "loss on validation rows", f"{result.evaluation.loss:.4f}", "", rows


def _settings(
    recipe: Recipe,
    result: RunResult,
    parts: tuple[str, ...],
    arguments: TrainingArguments,
    data: Mapping[str, Any],
) -> Iterator[tuple[str, object]]:
    """Yield rows of the table of settings."""
    yield "method", result.method
    if recipe.trains_experts:
        experts = (recipe.train or TrainSpec()).experts
        yield "experts", {"selection": "a selection, below", "all": "all"}.get(experts, "none")
    if parts:
        yield "also trained", ", ".join(parts)
    if result.adapter is not None:
        yield "rank, alpha", f"{result.adapter['r']}, {result.adapter['alpha']}"
    yield from _data(recipe, data)
    packed = "packed into blocks of" if recipe.data.packing else "rows of at most"
    yield "learnt", f"{recipe.data.loss_on} tokens, {packed} {recipe.data.max_length:,}"
    best = f", the weights are those of step {result.best_step}" if result.best_step else ""
    yield "steps", f"{result.steps:,}{best}"
    size, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    yield "batch", f"{size * times}" + (f" ({times} times {size})" if times > 1 else "")
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    yield "learning rate", f"{arguments.learning_rate:g}, {schedule}"
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if "adam" in optimizer:
        optimizer += f", betas {arguments.adam_beta1:g} and {arguments.adam_beta2:g}"
    yield "optimizer", f"{optimizer}, weight decay {arguments.weight_decay:g}"
    yield "seed", arguments.seed
    if result.train_loss is not None:
        yield "training loss (mean over the steps)", f"{result.train_loss:.4f}"
    yield "size of the weights here", f"{result.delta_bytes:,} bytes"
    yield "time", f"{result.seconds:,.0f} s, {result.tokens_per_second:,.0f} tokens/s"
    yield "peak memory", f"{result.peak_memory / 1e9:.1f} GB"


def _data(recipe: Recipe, data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for which, title in (("train", "training"), ("eval", "validation"), ("test", "test")):
        sources = recipe.data.sources(which)  # type: ignore[arg-type]
        found = data.get(which)
        for number, source in enumerate(sources, start=1):
            one = found[str(number)] if len(sources) > 1 and isinstance(found, Mapping) else found
            hashes = ", ".join(f"sha256 {digest}" for digest in _digests(one))
            share = "" if source.weight is None else f", weight {source.weight:g}"
            yield f"{title} data", f"{shown_path(source.path)}{share} ({hashes})"
        if which == "eval" and recipe.data.eval_rows is not None:
            yield "validation data", f"{recipe.data.eval_rows} of the training rows, set aside"


def _digests(identity: Any) -> list[str]:
    """Return the sha256 in what `esft.data.sources.identity` said, of at most some files."""
    if isinstance(identity, str):
        return [identity]
    if isinstance(identity, Mapping) and "sha256" in identity:
        return _digests(identity["sha256"])
    if isinstance(identity, Mapping):
        return [digest for value in identity.values() for digest in _digests(value)][:8]
    return []


def _on_hub(source: SourceSpec) -> bool:
    return not is_local(source.path)


def _rule(selection: Selection, recipe: Recipe) -> str:
    """Return the rule of a selection in words."""
    words = rule_words(selection.rule)
    if not isinstance(recipe.selection, SelectionSpec):
        return words
    return f"{words}, on {recipe.selection.tokens:,} tokens of the training data at most"

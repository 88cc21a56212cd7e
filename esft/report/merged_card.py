"""The model card of a merged checkpoint: its base, and the deltas that are in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.report.base_card import TAGS, cell, describe_base, is_hub_id, shown_path
from esft.report.card_sections import front_matter
from esft.secrets import redact

if TYPE_CHECKING:
    from esft.delta import Delta

_ESFT = "[esft](https://arxiv.org/abs/2407.01906)"


def merged_card(base: str | Path, folder: Path, deltas: Sequence[Delta], changed: int) -> str:
    """Return a merged checkpoint's card: Markdown with the hub's metadata in front.

    A manifest may come from anywhere: what is not as `esft train` writes it is left out.

    Args:
        base: as the user names it, for deltas that do not.
        folder: the base's files.
        deltas: in the order in which they were applied.
        changed: tensors of the base that they replace, 0 where the merge was computed.
    """
    manifests = [delta.manifest for delta in deltas]
    named = _text(manifests[0], "base", "name") or str(base)
    about = describe_base(named, folder, _text(manifests[0], "base", "architecture"))
    sources = [source for manifest in manifests for source in _train_sources(manifest)]
    data: dict[str, Any] = {"library_name": "transformers", "tags": TAGS}
    data |= about.metadata("finetune")
    if hub := [source for source in sources if is_hub_id(source)]:
        data["datasets"] = list(dict.fromkeys(hub))
    count = "a delta" if len(deltas) == 1 else f"{len(deltas)} deltas"
    tensors = f"Of {len(deltas[0].base)} tensors {changed} differ from the base's. "
    lines = [
        front_matter(**data),
        f"# {cell(about.name)}, specialised",
        "",
        f"A merge by {_ESFT} of the base {cell(about.name)} and {count}. "
        f"{tensors if changed else ''}This is an ordinary checkpoint: load it with transformers; "
        f"esft is not needed.",
        "",
        "| delta | method | experts | steps | trained on | made with |",
        "|---|---|---|---|---|---|",
        *(_row(delta) for delta in deltas),
    ]
    return redact("\n".join(lines) + "\n")


def _row(delta: Delta) -> str:
    manifest = delta.manifest
    experts = _at(manifest, "selection", "experts")
    chosen = "" if not isinstance(experts, Mapping) else _experts(experts)
    trained_on = ", ".join(shown_path(source) for source in _train_sources(manifest))
    made = [f"{name} {_text(manifest, 'versions', name)}" for name in ("esft", "transformers")]
    cells = [
        delta.folder.resolve().name,
        delta.method,
        chosen,
        _text(manifest, "training", "steps") or "",
        trained_on,
        ", ".join(made),
    ]
    return f"| {' | '.join(cell(value) for value in cells)} |"


def _experts(experts: Mapping[str, Any]) -> str:
    lists = [ids for ids in experts.values() if isinstance(ids, list)]
    return f"{sum(map(len, lists))} in {len(lists)} layers"


def _train_sources(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the training data's paths and hub ids, as a recipe names them."""
    given = _at(manifest, "recipe", "data", "train")
    for item in given if isinstance(given, list) else [given]:
        path = item.get("path") if isinstance(item, Mapping) else item
        if isinstance(path, str) and path:
            yield path


def _at(value: Any, *keys: str) -> Any:
    """Return what lies under nested keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any, *keys: str) -> str | None:
    found = _at(value, *keys)
    return str(found) if isinstance(found, str | int) and str(found) else None

"""The model card of a delta that `esft.SaveDelta` saved from a trainer of somebody else's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from esft.manifest import versions
from esft.report.base_card import TAGS, BaseCard
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

if TYPE_CHECKING:
    from esft.selection import Selection

_HEAD = f"""\
{{{{ front }}}}
# {{{{ base.name | cell }}}}, specialised by ESFT

What {ESFT} changed in {{{{ base.name | cell }}}}. {BELONGS}

"""
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,60}")
# Where things lie, and whose they are, is nobody else's business.
_PRIVATE = re.compile(r"(dir|name|path|id|project|hub\w*|report_to)$")


def saved_card(about: Mapping[str, Any], selection: Selection | None, base: BaseCard) -> str:
    """Return the card: Markdown with the hub's metadata in front.

    Args:
        about: what the manifest says of the run, see `esft.manifest.write_manifest`; `training`
            has `steps`, `beside_the_selection` and `arguments`.
        selection: the experts that trained, if any were selected.
        base: what may be said of it.
    """
    metadata = {"library_name": "esft", "tags": TAGS, **base.metadata("adapter")}
    return render(
        _HEAD + USE + TRAINING + EXPERTS + VERSIONS,
        front=front_matter(**metadata),
        base=base,
        method=about["method"],
        switches=not about["training"]["beside_the_selection"],
        adapter=False,
        settings=list(_settings(about)),
        selection=selection,
        rule="" if selection is None else rule_words(selection.rule),
        versions=versions(),
    )


def _settings(about: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    training = about["training"]
    yield "method", about["method"]
    yield "steps", training["steps"]
    if training["beside_the_selection"]:
        yield "also trained", ", ".join(training["beside_the_selection"])
    for name, value in training["arguments"].items():
        told = isinstance(value, int | float) or (isinstance(value, str) and _WORD.fullmatch(value))
        if told and not _PRIVATE.search(name):
            yield name, value

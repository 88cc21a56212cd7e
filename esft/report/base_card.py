"""What a model card says of the base: its id on the hub, and what its own card lets inherit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from esft.locating import TINY_MOE, TINY_MOE_FOLDER

CARD = "README.md"  # as the hub calls a model card
TAGS = ["esft", "mixture-of-experts"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_CACHE = re.compile(r"models--([A-Za-z0-9][\w.-]*?)--([A-Za-z0-9][\w.-]*)")
_FRONT = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
_TEXT = "text-generation"


@dataclass(frozen=True)
class BaseCard:
    """What is told of a base to those who do not have the folder that it was read from.

    Attributes:
        name: its id on the hub, `tiny-moe`, or the name of its folder, without the path to it.
        hub_id: where the hub has it, or None.
        license: `license`, `license_name` and `license_link` of its card, those that are known.
        pipeline_tag: what it is for, in the hub's words.
    """

    name: str
    hub_id: str | None
    license: dict[str, str]
    pipeline_tag: str | None

    @property
    def argument(self) -> str:
        """What to give for it to a command or a function, if it can be known; else `BASE`."""
        return self.name if self.hub_id is not None or self.name == TINY_MOE else "BASE"

    def metadata(self, relation: str) -> dict[str, Any]:
        """Return the keys of a card's front matter that follow from the base.

        Args:
            relation: to the base, in the hub's words: `adapter` or `finetune`.
        """
        found: dict[str, Any] = dict(self.license)
        if self.pipeline_tag is not None:
            found["pipeline_tag"] = self.pipeline_tag
        if self.hub_id is not None:
            found |= {"base_model": self.hub_id, "base_model_relation": relation}
        return found


def describe_base(model: str, folder: Path | None, architecture: str | None) -> BaseCard:
    """Return what a card may say of a base.

    Args:
        model: as the recipe or the delta names it: a hub id, `tiny-moe`, or a folder's path.
        folder: where its files are; its own card is read if it is among them.
        architecture: name of its class in transformers.
    """
    hub_id = _hub_id(model)
    found = {} if folder is None else _front_matter(folder / CARD)
    pipeline = _word(found.get("pipeline_tag"))
    if pipeline is None and (architecture or "").endswith("ForCausalLM"):
        pipeline = _TEXT
    return BaseCard(
        name=hub_id or Path(model).name,
        hub_id=hub_id,
        license=_license(found, hub_id),
        pipeline_tag=pipeline,
    )


def shown_path(path: str) -> str:
    """Return what may be told of a data source: a hub id or, of a path, its last part only."""
    given = Path(path)
    if given.is_relative_to(TINY_MOE_FOLDER):
        return f"{TINY_MOE}:{given.relative_to(TINY_MOE_FOLDER).as_posix()}"
    return path if is_hub_id(path) else given.name


def is_hub_id(path: str) -> bool:
    """Tell whether a text that names no local path is `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


def cell(value: object) -> str:
    """Return a value as it may stand in a cell of a Markdown table."""
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")


def _hub_id(model: str) -> str | None:
    if is_hub_id(model):
        return model
    cached = _HUB_CACHE.search(model)  # the folder of a snapshot that the hub's client made
    return f"{cached[1]}/{cached[2]}" if cached else None


def _license(found: dict[str, Any], hub_id: str | None) -> dict[str, str]:
    licensed = {
        key: word
        for key in ("license", "license_name", "license_link")
        if (word := _word(found.get(key))) is not None
    }
    if "license" not in licensed:
        return {}
    link = licensed.get("license_link")
    if link is not None and not urlparse(link).scheme:
        # A file beside the base's card; it is not beside this one.
        del licensed["license_link"]
        if hub_id is not None:
            licensed["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return licensed


def _front_matter(card: Path) -> dict[str, Any]:
    """Return the metadata of a card; nothing where there is none that can be read."""
    try:
        match = _FRONT.match(card.read_text(encoding="utf-8-sig"))
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}  # it is the base's, and no reason to fail once training is done
    return found if isinstance(found, dict) else {}


def _word(value: object) -> str | None:
    """Return a short text of one line, or None for anything else."""
    fits = isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()
    return value if isinstance(value, str) and fits else None

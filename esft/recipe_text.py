"""A recipe as text: YAML whose keys remember their lines, and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from esft.errors import RecipeError

Key = tuple[str, ...]  # ("training", "max_steps")

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_BOOL = "tag:yaml.org,2002:bool"
_BOOLEANS = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = "tag:yaml.org,2002:float"
_INT = "tag:yaml.org,2002:int"
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


@dataclass(frozen=True)
class Override:
    """A value that replaces one of the recipe's.

    Attributes:
        source: what the user wrote, for messages: `--p`, or `--set selection.p`.
        key: which key.
        value: the value, as YAML would have given it.
    """

    source: str
    key: Key
    value: Any


def parse_override(text: str) -> Override:
    """Read `key=value`: dots between nested keys, the value in YAML.

    Raises:
        RecipeError: it is nothing like that.
    """
    dotted, equals, value = text.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key):
        raise RecipeError(f"--set {text}: write key=value, such as training.max_steps=100")
    try:
        return Override(f"--set {'.'.join(key)}", key, _parse(value)[1])
    except (yaml.YAMLError, ValueError, LookupError, RecursionError):
        raise RecipeError(f"--set {text}: the value is not YAML") from None


class Places:
    """Knows where each key was set: on a line of the recipe, or by an override.

    Args:
        path: the recipe, if there is one.
        node: what it was parsed from.
    """

    def __init__(self, path: Path | None = None, node: Node | None = None) -> None:
        self._path, self._node = path, node
        self._overrides: list[Override] = []

    def overridden(self, override: Override) -> None:
        """Remember that a key was overridden."""
        self._overrides.append(override)

    def of(self, key: Key) -> str:
        """Return `recipe.yaml:3: a.b`, `--set a.b`, `--p`, or where there is neither, `a.b`."""
        dotted = ".".join(key)
        for override in reversed(self._overrides):
            if key[: len(override.key)] == override.key:
                return override.source + "".join(f".{part}" for part in key[len(override.key) :])
        if self._path is None:
            return dotted or "recipe"
        return f"{self._path}:{self._line(key)}" + (f": {dotted}" if dotted else "")

    def _line(self, key: Key) -> int:
        """Return the line of a key, or of the innermost value around it that is there."""
        node, line = self._node, 1
        for part in key:
            if isinstance(node, SequenceNode) and part.isdecimal() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = node.start_mark.line + 1
                continue
            pairs = node.value if isinstance(node, MappingNode) else []
            found = next((pair for pair in pairs if pair[0].value == part), None)
            if found is None:
                break
            node, line = found[1], found[0].start_mark.line + 1
        return line


def read_mapping(path: Path) -> tuple[dict[str, Any], Places]:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file is missing or not YAML; the message has the line.
    """
    try:
        node, value = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe; to train a model without a recipe, give --data"
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            f"{path}: a folder, not a recipe; to train a model without a recipe, give --data"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot read this recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: this recipe is not UTF-8 text (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise RecipeError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not usable YAML: nested too deep") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys (model, data, ...)")
    return value, Places(path, node)


def to_yaml(value: Mapping[str, Any]) -> str:
    """Write a mapping as YAML that `read_mapping` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str) -> tuple[Node | None, Any]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return PyYAML's rules for plain text, less dates, plus `1e-3`; `no` is text.

    PyYAML speaks YAML 1.1, which reads `1e-3` as text and `no` as false; people, and YAML 1.2, mean
    a number and, in `save_strategy: no`, a word. A date is nothing that a recipe could use.
    """
    rules = {
        first: [
            (tag, _BOOLEANS if tag == _BOOL else pattern)
            for tag, pattern in known
            if tag != _TIMESTAMP
        ]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        rules.setdefault(first, []).append((_FLOAT, _EXPONENT))
    return rules


def _others_too(
    rules: dict[str, list[tuple[str, re.Pattern[str]]]],
) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return rules for plain text together with PyYAML's own."""
    known = yaml.SafeLoader.yaml_implicit_resolvers
    return {first: [*rules[first], *known.get(first, [])] for first in rules}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which runs no code; without aliases and without keys given twice."""

    yaml_implicit_resolvers = _resolvers()

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            # A few lines of aliases can stand for more values than memory holds.
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not for recipes", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        # Python refuses to read some larger ones, and others later, to print them.
        value: int = 2**63 if len(node.value) > 100 else super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(
                None, None, "a whole number of more than 64 bits", node.start_mark
            )
        return value


_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around what `_Loader`, or another reader, would not read as text."""

    yaml_implicit_resolvers = _others_too(_resolvers())

    def ignore_aliases(self, data: Any) -> bool:
        return True

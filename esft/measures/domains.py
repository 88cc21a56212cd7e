"""The other domains that a model is held to: names, and where their rows are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from esft.data.readers import is_data_file
from esft.data.sources import Source
from esft.errors import DataError


def domains(general: str | Path | Mapping[str, Source]) -> dict[str, Source]:
    """Return the source of each domain.

    Args:
        general: a folder, each data file in it a domain that is called as the file without its
            suffixes; or one such file; or the domains by name.

    Raises:
        DataError: there are none, or two files of a folder have one name.
    """
    if isinstance(general, Mapping):
        if not general:
            raise DataError("evaluation.general: no domain is named")
        return dict(general)
    path = Path(general).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such folder of domains")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found: dict[str, Source] = {}
    for file in files:
        if not is_data_file(file) or file.name.startswith("."):
            continue
        name = file.name.partition(".")[0]
        if name in found:
            raise DataError(f"{file}: {found[name].path} is the domain {name} already")
        found[name] = Source(str(file))
    if not found:
        raise DataError(
            f"{path}: no domain: expected data files (.jsonl, .json, .csv, .parquet), each a domain"
        )
    return found


def domain_names(general: str | Mapping[str, object] | None) -> Iterable[str]:
    """Return the names of the domains that a recipe's `evaluation.general` gives; none for None.

    Raises:
        DataError: as for `domains`, of a folder.
    """
    return domains(general) if isinstance(general, str) else general or ()

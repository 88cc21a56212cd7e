"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from esft.data.readers import Found, without_nulls
from esft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(path: str) -> bool:
    """Tell whether a text could name a data set of the hub: `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


def read_hub(name: str, config: str | None, split: str | None) -> Found:
    """Download a data set, or find its cached copy, and yield its rows as `owner/name:split[row]`.

    Args:
        name: `owner/name`, or whatever else `datasets.load_dataset` takes.
        config: which of the data set's configurations; None if it has but one.
        split: which of its splits; None if it has but one.

    Raises:
        DataError: there is no such data set, configuration or split, the hub cannot be reached and
            there is no cached copy, or a choice is missing.
    """
    from datasets import DatasetDict

    data = _load(name, config, split)
    if isinstance(data, DatasetDict):
        if len(data) != 1:
            raise DataError(
                f"{name}: has the splits {', '.join(map(str, data))}; say which, as in "
                f"data.train: {{path: {name}, split: {next(iter(data), 'train')}}} (--split)"
            )
        ((split, data),) = data.items()
    place = ":".join(str(part) for part in (name, config, split) if part is not None)
    for index, value in enumerate(data):
        yield f"{place}[{index}]", without_nulls(value)


def _load(name: str, config: str | None, split: str | None) -> Dataset | dict[str, Dataset]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        with _without_progress_bars():
            return datasets.load_dataset(name, config, split=split)
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise DataError(
                f"{name}: the hub gives this data set only to those who accepted its terms; "
                f"accept them on its page, then run: hf auth login"
            ) from error
        raise DataError(
            f"{name}: no such file or folder, and no such data set on the hub (a private one "
            f"needs: hf auth login)"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{name}: no such file or folder, and the hub cannot be reached and has no cached copy "
            f"here; go online once, or give a file"
        ) from error
    # A configuration or split that is not there, files that are no data, a full disk, ...
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: cannot load this data set: {reason}") from error


@contextmanager
def _without_progress_bars() -> Iterator[Any]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()

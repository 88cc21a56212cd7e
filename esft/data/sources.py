"""Where rows come from: a file, a folder of files, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esft.data.bad_rows import STRICT, BadRows
from esft.data.formats import EXPECTED, FORMATS, Format, FormatOrAuto, detect, make_row
from esft.data.hub import is_hub_id, read_hub
from esft.data.mixture import StoppingStrategy, mix, shares
from esft.data.readers import Found, data_suffix, is_data_file, read_file
from esft.data.row import Row
from esft.errors import DataError, nearest
from esft.files import sha256_file
from esft.locating import locate_shipped
from esft.progress import SILENT, Reporter

# How the files of a folder are called whose author divided them.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z0-9])")


@dataclass(frozen=True)
class Source:
    """Rows of one format.

    Attributes:
        path: a file, a folder of files, a data set of the hub (`owner/name`), or what ships with
            `tiny-moe` (`tiny-moe:tasks/dates/train.jsonl`).
        format: of each row; `auto` is the first row's.
        split: of a data set of the hub, or the beginning of the names of a folder's files.
        config: of a data set of the hub.
        weight: the source's part in a mixture, above 0; None is 1 where others have one.
    """

    path: str
    format: FormatOrAuto = "auto"
    split: str | None = None
    config: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        known = ("auto", *FORMATS)
        if self.format not in known:
            raise DataError(
                f'--format "{self.format}": expected one of {", ".join(known)}'
                f"{nearest(self.format, known)}"
            )


@dataclass
class SourceRows:
    """What was read of a source.

    Attributes:
        source: which.
        rows: at least one.
        format: theirs.
    """

    source: Source
    rows: list[Row] = field(default_factory=list)
    format: Format | None = None


def read_sources(
    sources: Sequence[Source],
    *,
    strategy: StoppingStrategy = "first_exhausted",
    seed: int = 0,
    bad_rows: BadRows = STRICT,
    reporter: Reporter = SILENT,
) -> list[Row]:
    """Read rows: one source's after the other's, or where one has a weight, a mixture of them.

    Args:
        sources: of a task set; none give no rows.
        strategy: where a mixture ends, see `esft.data.mixture.shares`.
        seed: of a mixture.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        reporter: told the format and the number of rows of each source.

    Raises:
        DataError: a source cannot be read, or has no rows, or a row cannot be used; the message
            starts with the file, or `file:line`.
    """
    read = [read_source(source, bad_rows=bad_rows, reporter=reporter) for source in sources]
    return join(read, strategy=strategy, seed=seed, reporter=reporter)


def join(
    read: Sequence[SourceRows],
    *,
    strategy: StoppingStrategy = "first_exhausted",
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> list[Row]:
    """Return the rows of sources that were read. Args and errors as for `read_sources`."""
    weights = [1 if found.source.weight is None else found.source.weight for found in read]
    if all(found.source.weight is None for found in read):
        return [row for found in read for row in found.rows]
    counts = shares([len(found.rows) for found in read], weights, strategy)
    for found, weight, count in zip(read, weights, counts, strict=True):
        path = found.source.path
        if not count:
            raise DataError(
                f"{path}: a weight of {weight:g} of {sum(weights):g} gives it none of the "
                f"{sum(counts):,} rows that the smallest source allows for; raise its weight, or "
                f"set data.stopping_strategy: all_exhausted"
            )
        reporter.note(
            f"{path}: {count:,} of the mixture's {sum(counts):,} rows, of {len(found.rows):,} "
            f"(weight {weight:g} of {sum(weights):g})"
        )
    return mix([found.rows for found in read], counts, seed=seed)


def read_source(
    source: Source, *, bad_rows: BadRows = STRICT, reporter: Reporter = SILENT
) -> SourceRows:
    """Read one source's rows. Args and errors as for `read_sources`."""
    skipped = len(bad_rows.skipped)
    read = SourceRows(source, format=None if source.format == "auto" else source.format)
    found, about = _find(source, bad_rows)
    first = ""
    for where, value in found:
        try:
            format = detect(value, where) if source.format == "auto" else source.format
            if read.format not in (None, format):
                raise DataError(
                    f"{where}: a row with {format}, but {first} has {read.format}; one source has "
                    f"one format"
                )
            read.rows.append(make_row(value, where, format))
        except DataError as error:
            bad_rows.skip(error)
            continue
        first, read.format = first or where, format
    if not read.rows:
        if len(bad_rows.skipped) > skipped:
            last = bad_rows.skipped[-1]
            raise DataError(
                f"{source.path}: not one row can be used (the last: {last['where']}: "
                f"{last['reason']})"
            )
        raise DataError(f"{source.path}: no rows in it; {EXPECTED} in each")
    notes = [f"{read.format}", _counted(len(read.rows), "row"), *about]
    if len(bad_rows.skipped) > skipped:
        notes.append(f"{bad_rows.counted(since=skipped)} skipped")
    reporter.note(f"{source.path}: {', '.join(notes)}")
    return read


def identity(source: Source) -> Any:
    """Return what must be the same for two readings of a source to give the same rows.

    The sha256 of a file, or of the rows of a data set of the hub; of a folder, that of each file,
    numbered from 1. Where the source has a format or a weight, these with it. Where files lie, and
    how they are called, does not matter.

    Raises:
        DataError: the source cannot be read.
    """
    contents: Any
    if (found := _files(source)) is not None:
        hashes = [_sha256(file) for file in found[0]]
        numbered = {str(number): one for number, one in enumerate(hashes, start=1)}
        contents = hashes[0] if len(hashes) == 1 else numbered
    else:
        digest = hashlib.sha256()
        for _, value in read_hub(source.path, source.config, source.split):
            digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
        contents = digest.hexdigest()
    if source.format == "auto" and source.weight is None:
        return contents
    return {"format": source.format, "weight": source.weight, "sha256": contents}


def is_local(path: str, folder: Path = Path()) -> bool:
    """Tell whether a source is a file or folder; what is neither there nor a hub id counts as one.

    A path may look like `owner/name`: then it is local if it is there, or called like a file.
    """
    return is_data_file(Path(path)) or not is_hub_id(path) or (folder / path).exists()


def _find(source: Source, bad_rows: BadRows) -> tuple[Found, list[str]]:
    """Return a source's rows as objects, and what is to be said of its files."""
    found = _files(source)
    if found is None:
        return read_hub(source.path, source.config, source.split), []
    files, ignored = found

    def read() -> Found:
        for file in files:
            yield from read_file(file, bad_rows)

    about = [] if files == [Path(source.path)] else [_counted(len(files), "file")]
    if ignored:
        more = ", ..." if len(ignored) > 3 else ""
        about.append(f"ignored {', '.join(ignored[:3])}{more}")
    return read(), about


def _files(source: Source) -> tuple[list[Path], list[str]] | None:
    """Return the files of a source and the names of those that are ignored; None of the hub."""
    path = Path(locate_shipped(source.path)).expanduser()
    if not is_local(str(path)):
        return None
    if source.config is not None:
        raise DataError(f"{path}: config (--config) is for data sets of the hub")
    if path.is_dir():
        return _files_of_folder(path, source.split)
    if source.split is not None:
        raise DataError(f"{path}: split (--split) is for folders and data sets of the hub")
    return [path], []


def _files_of_folder(folder: Path, split: str | None) -> tuple[list[Path], list[str]]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if {"state.json", "dataset_info.json"} <= {entry.name for entry in entries}:
        raise DataError(
            f"{folder}: a data set as datasets' save_to_disk writes it; write it with to_parquet "
            f"or to_json instead"
        )
    files = [entry for entry in entries if entry.is_file() and is_data_file(entry)]
    if split is not None:
        named = [f for f in files if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", f.name)]
        if files and not named:
            raise DataError(f"{folder}: no data file whose name begins with the split {split!r}")
        files = named
    if not files:
        raise DataError(f"{folder}: no data files in this folder (.jsonl, .json, .csv, .parquet)")
    splits = {found[1] for file in files if (found := _SPLIT.match(file.name))}
    if len(splits) > 1:
        raise DataError(
            f"{folder}: has files of the splits {', '.join(sorted(splits))}; say which with split "
            f"(--split), or name a file"
        )
    suffixes = {data_suffix(file): file.name for file in files}
    if len(suffixes) > 1:
        a, b, *_ = suffixes.values()
        raise DataError(f"{folder}: has files of several kinds ({a}, {b}); name one of them")
    return files, [entry.name for entry in entries if entry not in files]


def _sha256(file: Path) -> str:
    try:
        return sha256_file(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{file}: no such data file") from None
        raise DataError(f"{file}: cannot read this data file: {error.strerror}") from None


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'' if count == 1 else 's'}"

"""Readers of data files: rows as JSON-like objects, each with the place it came from.

A reader yields `(where, value)`. What is wrong with one row goes to `bad_rows`, which raises unless
that row may be skipped; what is wrong with a file is raised.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from esft.data.bad_rows import BadRows
from esft.data.formats import EXPECTED, STRUCTURED
from esft.data.streams import COMPRESSED, LONGEST_LINE, decoded, lines, opened
from esft.data.values import kind, parsed
from esft.errors import DataError

Found = Iterator[tuple[str, dict[str, Any]]]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD = 4096  # bytes
_ROWS_AT_ONCE = 1000  # of a table


def read_file(path: Path, bad_rows: BadRows) -> Found:
    """Yield a data file's rows with their places, `file:line` or `file[row]`.

    Raises:
        DataError: the file cannot be read, or a row cannot be and may not be skipped.
    """
    reader = _READERS.get(data_suffix(path))
    if not path.exists():
        raise DataError(f"{path}: no such data file")
    if reader is None:
        raise DataError(
            f"{path}: not known as a data file by its name; expected one that ends in "
            f"{', '.join(_READERS)}, or in one of these and .gz or .zst"
        )
    return reader(path, bad_rows)


def data_suffix(path: Path) -> str:
    """Return the part of a file's name that says how to read it: `.jsonl` of `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_data_file(path: Path) -> bool:
    """Tell from its name whether a file can be read."""
    return data_suffix(path) in _READERS


def without_nulls(value: Any) -> Any:
    """Return a table's value less the keys that are null in its objects.

    A table's columns have all keys that any row has, and null in the rows that lack them.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(item) for k, item in value.items() if item is not None}
    # Of token ids there are many; lists have items of one type.
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(item) for item in value]
    return value


# JSON


def _json_lines(path: Path, bad_rows: BadRows) -> Found:
    with opened(path) as file:
        yield from _lines_of_json(file, path, bad_rows)


def _lines_of_json(file: IO[bytes], path: Path, bad_rows: BadRows) -> Found:
    for number, line in lines(file):
        where = f"{path}:{number}"
        try:
            # A byte-order mark is a mark only at the very start.
            if number == 1 and line is not None:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            text = decoded(line, where)
            if text.strip():
                yield where, _object(_parse(text, where), where)
        except DataError as error:
            bad_rows.skip(error)


def _json(path: Path, bad_rows: BadRows) -> Found:
    """Read a list of objects; or lines of JSON, which many call .json, too."""
    if not _begins_a_list(path):
        yield from _json_lines(path, bad_rows)
        return
    with opened(path) as file:
        data = file.read().removeprefix(_BYTE_ORDER_MARK)
    for index, value in enumerate(_parse_list(data, path)):
        where = f"{path}[{index}]"
        try:
            yield where, _object(value, where)
        except DataError as error:
            bad_rows.skip(error)


def _begins_a_list(path: Path) -> bool:
    with opened(path) as file:
        head = file.read(_HEAD).removeprefix(_BYTE_ORDER_MARK).lstrip()
        while not head and (block := file.read(_HEAD)):
            head = block.lstrip()
    return head.startswith(b"[")


def _parse_list(data: bytes, path: Path) -> list[Any]:
    """Parse a whole file: where it is wrong there are no rows to be skipped."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8: byte {data[error.start]:#04x}; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number too long
        raise DataError(f"{path}: not usable JSON: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # Nothing but white space after the place where the parser gave up: the end is missing.
        if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
            raise DataError(
                f"{where}: not JSON: the line ends in the middle of a value (cut off?); "
                f"expected one complete object a line"
            ) from None
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.pos + 1}; "
            f"expected one complete object a line"
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number too long
        raise DataError(f"{where}: not usable JSON: {error}") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {kind(value)}, not an object; {EXPECTED}")
    return value


# CSV


def _csv(path: Path, bad_rows: BadRows) -> Found:
    """Read comma-separated values as RFC 4180 has them, the first line naming the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))  # of this process
    with opened(path) as file:
        records = csv.reader(_text_of_csv(file, path), strict=True)
        names: list[str] | None = None
        while True:
            start = records.line_num + 1
            where = f"{path}:{start}"
            try:
                fields = next(records)
                _check_fields(fields, where)
            except StopIteration:
                return
            except (csv.Error, DataError) as error:
                error = _explained(error, path, start) if isinstance(error, csv.Error) else error
                if names is None:
                    raise error from None
                bad_rows.skip(error)
                continue
            if not fields:  # a blank line
                continue
            if names is None:
                names = _column_names(fields, where)
                continue
            try:
                yield where, _record(names, fields, where)
            except DataError as error:
                bad_rows.skip(error)


def _text_of_csv(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in lines(file):
        if line is None:
            raise DataError(f"{path}: line {number} has more than {LONGEST_LINE >> 20} MiB")
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        # What is not UTF-8 gets through, to be told as of its record.
        yield line.decode(errors="surrogateescape")


def _explained(error: csv.Error, path: Path, line: int) -> DataError:
    if "unexpected end" in str(error):  # how many rows it took with it, nobody knows
        return DataError(f"{path}: the record of line {line} opens a quote that is never closed")
    return DataError(f"{path}:{line}: not CSV: {error}")


def _check_fields(fields: list[str], where: str) -> None:
    for field in fields:
        decoded(field.encode(errors="surrogateescape"), where)


def _column_names(fields: list[str], where: str) -> list[str]:
    for name in fields:
        if name and fields.count(name) > 1:
            raise DataError(f"{where}: two columns are called {name!r}")
    return fields


def _record(names: list[str], fields: list[str], where: str) -> dict[str, Any]:
    if len(fields) != len(names):
        raise DataError(
            f"{where}: {len(fields)} fields, but the first line names {len(names)} columns; is a "
            f'field with a comma, a quote or a line break not in "quotes"?'
        )
    value: dict[str, Any] = {}
    for name, field in zip(names, fields, strict=True):
        if name not in STRUCTURED:
            value[name] = field
        elif field.strip():
            value[name] = parsed(field, f"`{name}`", where)
    return value


# Parquet


def _parquet(path: Path, bad_rows: BadRows) -> Found:
    import pyarrow
    from pyarrow import parquet

    try:
        with opened(path) as file, parquet.ParquetFile(file) as table:
            index = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                for value in batch.to_pylist():
                    yield f"{path}[{index}]", without_nulls(value)
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a usable Parquet file: {reason}") from None


_READERS: dict[str, Callable[[Path, BadRows], Found]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}

"""Rows of one source, for those who need no more than a path."""

from __future__ import annotations

from pathlib import Path

from esft.data.bad_rows import STRICT, BadRows
from esft.data.row import Row
from esft.data.sources import Source, read_source
from esft.progress import SILENT, Reporter


def read_rows(
    data: str | Path | Source, *, bad_rows: BadRows = STRICT, reporter: Reporter = SILENT
) -> list[Row]:
    """Read a task set: a file, a folder of files, or a data set of the hub.

    Args:
        data: `.jsonl`, `.json`, `.csv` or `.parquet`, a folder of such files, or `owner/name`; a
            `Source` says also how to read it.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        reporter: told the format and the number of rows.

    Raises:
        DataError: the data cannot be read, or holds no rows, or a row cannot be used; the message
            starts with `file:` or `file:line:`.
    """
    source = data if isinstance(data, Source) else Source(str(data))
    return read_source(source, bad_rows=bad_rows, reporter=reporter).rows

"""Rows that cannot be used: the first one stops the work, or, if asked for, some are skipped."""

from __future__ import annotations

import json
import re
from pathlib import Path

from esft.errors import DataError
from esft.files import write_text

# `file:line: reason`, or `file[row]: reason` where rows have no lines of their own.
_PLACED = re.compile(r"(?P<where>.+?(?::\d+|\[\d+\])): (?P<reason>.+)", flags=re.DOTALL)


class BadRows:
    """Counts rows that cannot be used, up to a limit.

    One object serves a whole command, so that the limit holds for reading and tokenising, and for
    training and test rows, together.

    Args:
        limit: how many rows may be skipped, as by `--skip-bad`; 0 allows none.

    Attributes:
        limit: as given.
        skipped: what was skipped, in order: `{"where": "file:line", "reason": ...}`.

    Raises:
        DataError: the limit is negative.
    """

    def __init__(self, limit: int = 0) -> None:
        if limit < 0:
            raise DataError(f"--skip-bad {limit}: expected 0 or more")
        self.limit = limit
        self.skipped: list[dict[str, str]] = []
        self._places: set[str] = set()

    def skip(self, error: DataError) -> None:
        """Skip the row that `error` is about, if another one may be skipped.

        A row counts once, however often it is drawn or read.

        Raises:
            DataError: `error` itself, if no row may be skipped or it is not about a single row;
                or what it says and how many were skipped before, if that is all that may be.
        """
        placed = _PLACED.fullmatch(str(error))
        if placed is None or not self.limit:
            raise error
        if placed["where"] in self._places:
            return
        if len(self.skipped) == self.limit:
            raise DataError(
                f"{error} ({self.counted()} skipped before this one, as many as --skip-bad "
                f"{self.limit} allows)"
            ) from error
        self._places.add(placed["where"])
        self.skipped.append(placed.groupdict())

    def counted(self, since: int = 0) -> str:
        """Return `3 bad rows`, less the first `since` of those that were skipped."""
        count = len(self.skipped) - since
        return f"{count:,} bad row{'' if count == 1 else 's'}"

    def write(self, path: Path) -> None:
        """Write what was skipped as JSONL: `{"where": ..., "reason": ...}` a line.

        Raises:
            OutputError: see `esft.files.write_bytes`.
        """
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.skipped)
        write_text(path, "".join(lines))


# Never changes: with a limit of 0, `skip` raises before it records anything.
STRICT = BadRows()

"""An amount of memory as a user writes it: 80GB, 24GiB, 16000MB."""

from __future__ import annotations

import re
from fractions import Fraction

from esft.errors import EsftError

_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def memory_bytes(text: str | int, option: str = "--memory") -> int:
    """Read an amount of memory; `GB` is 10^9 bytes and `GiB` 2^30.

    Args:
        text: what the user wrote.
        option: where, for messages.

    Raises:
        EsftError: it is none, or not above 0.
    """
    match = _TEXT.fullmatch(str(text).strip())
    if isinstance(text, bool) or match is None:
        raise EsftError(f"{option} {text}: expected an amount such as 80GB, 24GiB or 16000MB")
    base = 1024 if match[3] else 1000
    amount = int(Fraction(match[1]) * base ** _POWERS[match[2].lower()])
    if not amount:
        raise EsftError(f"{option} {text}: must be above 0")
    return amount

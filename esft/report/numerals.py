"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """Write a count with its thousands apart: 12,345."""
    return f"{number:,.0f}"


def share(part: float) -> str:
    """Write a share of 1 as a percentage: 6.6 %."""
    return f"{100 * part:.1f} %"


def size(bytes_: float) -> str:
    """Write bytes with a decimal unit: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} B" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time: 0.42 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def rate(value: float) -> str:
    """Write a learning rate: 1e-4, 3.5e-5."""
    digits, _, power = f"{value:e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"

"""Names in pictures: cleaned, measured, broken into lines, and made into names of files."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# XML has no way to write these, escaped or not (XML 1.0, 2.2).
_UNSPEAKABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+")


def clean(text: str) -> str:
    """Return a user's text as one line that XML can hold."""
    return _UNSPEAKABLE.sub(" ", text).strip() or "(no name)"


def words(key: str) -> str:
    """Return a key such as `exact_match` as words."""
    return clean(key.replace("_", " "))


def file_name(*parts: str) -> str:
    """Return a name for a picture's files and identifiers.

    Letters, digits, dots and dashes stay; where anything else is replaced, a few digits of a hash
    keep names apart. Names of different parts differ if the first part, the kind of picture, is
    no other kind's beginning.
    """
    plain = "-".join(re.sub("[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts)
    if plain == "-".join(parts) and len(plain) <= 60:
        return plain
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()
    return f"{plain[:60].strip('-.')}-{digest[:6]}"


def text_width(text: str, size: float) -> float:
    """Return how wide a line is at most, in inches.

    As set in DejaVu Sans, which is wider than the fonts that viewers choose; letters beyond the
    European ones count as a full square.

    Args:
        text: one line.
        size: of the letters, in points.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    shown = [letter for letter in text if not unicodedata.combining(letter)]
    narrow = "".join(letter for letter in shown if ord(letter) < 0x500)
    squares = len(shown) - len(narrow)
    width, _, _ = text_to_path.get_text_width_height_descent(
        narrow, FontProperties(family="DejaVu Sans", size=size), ismath=False
    )
    return (width + squares * size) / 72


def wrap(text: str, inches: float, size: float) -> list[str]:
    """Break a text into lines that fit: after spaces and signs if it can be, else anywhere.

    Args:
        text: one line.
        inches: that a line may take.
        size: of the letters, in points.
    """
    lines = [""]
    for piece in re.findall(r"[^\s\-_/.,;:]*[\s\-_/.,;:]*", text):
        if text_width((lines[-1] + piece).rstrip(), size) <= inches:
            lines[-1] += piece
        elif text_width(piece.rstrip(), size) <= inches:
            lines.append(piece)
        else:
            for letter in piece:
                if text_width(lines[-1] + letter, size) > inches:
                    lines.append("")
                lines[-1] += letter
    return [line.rstrip() for line in lines if line.strip()]

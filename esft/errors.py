"""Errors that a user can cause: what is wrong, where it is, what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EsftError(Exception):
    """Base of every error that a user's input can cause.

    The message names the file and line, the tensor or the option, and says what to do. The
    command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class DataError(EsftError):
    """A line of a data file cannot be used. The message starts with `file:line:`."""


class RecipeError(EsftError):
    """A recipe, or an option that sets one of its keys, is wrong."""


class ModelError(EsftError):
    """A model cannot be loaded, or is not a mixture of experts that esft can train."""


class SelectionError(EsftError):
    """Scores or a selection cannot be read, or do not fit the model or the rule asked for."""


class OutputError(EsftError):
    """A file or folder cannot be written, or is in the way of what would be written."""


class DeltaError(EsftError):
    """A delta's files are damaged or incomplete."""


class CheckError(EsftError):
    """A check failed: a delta does not fit its base, or a verification found a difference."""

    exit_code = 3


class LostProcessError(EsftError):
    """Another process of the same run is gone or does not answer."""


class ElsewhereError(EsftError):
    """Another process of the same run failed and tells why; this one has nothing to add."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""

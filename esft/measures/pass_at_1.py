"""pass@1: whether the code of a model's one answer passes the row's tests."""

from __future__ import annotations

import re
from collections.abc import Sequence

from esft.data.row import Row
from esft.errors import DataError
from esft.measures.metric import Answer, Scores
from esft.measures.sandbox import run_tests
from esft.progress import SILENT, Reporter

_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def score(
    answers: Sequence[Answer], *, seconds: float = 10.0, reporter: Reporter = SILENT
) -> Scores:
    """Return 1 for each answer whose code runs and passes the row's tests.

    Args:
        answers: Python code, or text with a block of code between lines of three backticks.
        seconds: that an answer and its tests may take.
        reporter: shows progress.

    Raises:
        EsftError: no Python can be run in the sandbox here.
    """
    passed = []
    with reporter.task("running code", len(answers), "answer") as task:
        for answer in answers:
            program = f"{answer.row.setup}{code(answer.text)}"
            passed.append(float(run_tests(program, answer.row.tests, seconds=seconds).passed))
            task.advance()
    return Scores(passed)


def check(row: Row, reference: str) -> None:
    """Refuse a row that has no tests.

    Raises:
        DataError: it has none.
    """
    if not row.tests:
        raise DataError(f"{row.where}: pass_at_1: the row has no `tests` to run answers by")


def code(text: str) -> str:
    """Return the first fenced block of an answer, or all of it where there is none."""
    found = _FENCED.search(text)
    return found[1] if found else text

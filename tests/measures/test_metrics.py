"""Metrics against what is computed by hand, and against sacrebleu's own figures of a corpus."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sacrebleu import corpus_bleu, corpus_chrf, sentence_bleu, sentence_chrf

from esft.data.formats import make_row
from esft.data.row import Row
from esft.errors import DataError, EsftError
from esft.measures.metric import Answer, Scores, check_metrics, check_rows, score_answers
from esft.measures.pass_at_1 import code

SENTENCES = [
    ("the cat sat on the mat", "the cat sat on a mat"),
    ("he reads a book in the garden", "she reads the book in her garden"),
    ("completely different words here", "nothing is shared by these two"),
    ("a b c d e f g", "a b c d e f g"),
    ("", "an answer that is missing"),
    ("yes sir", "yes sir"),  # shorter than BLEU's longest n-gram
]


def answers(pairs: Sequence[tuple[str, str]], **row: Any) -> list[Answer]:
    return [Answer(Row(f"f:{n}", **row), text, ref) for n, (text, ref) in enumerate(pairs, 1)]


def scored(name: Any, pairs: Sequence[tuple[str, str]] = SENTENCES) -> Scores:
    return score_answers(name, answers(pairs))


@pytest.mark.parametrize(
    ("text", "reference", "equal"),
    [
        ('{"a": 1, "b": [2, 3]}', ' {"b":[2,3],"a":1}\n', True),
        ("1.0", "1", True),
        ("1", "true", False),
        ("[true]", "[1]", False),
        ("0", "false", False),
        ('{"a": true}', '{"a": true}', True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1} and so on', '{"a": 1}', False),
        ('{"a": 1, "a": 1}', '{"a": 1}', False),
        ("NaN", "null", False),
        ("", "null", False),
        ("[" * 100_000, "[]", False),
        ('"\\u00e4"', '"ä"', True),
    ],
)
def test_json_equal(text: str, reference: str, equal: bool) -> None:
    assert scored("json_equal", [(text, reference)]).rows == [float(equal)]


def test_a_reference_that_is_no_json_is_named() -> None:
    with pytest.raises(DataError, match=r"^f:3: json_equal: the reference answer is not JSON"):
        check_rows("json_equal", [(Row("f:2"), "{}"), (Row("f:3"), "{")])


def test_bleu_is_sacrebleu_s_of_the_corpus() -> None:
    texts, references = zip(*SENTENCES, strict=True)
    found = scored("bleu")
    assert found.value == pytest.approx(corpus_bleu(texts, [references]).score / 100)
    expected = [sentence_bleu(text, [ref]).score / 100 for text, ref in SENTENCES]
    assert found.rows == pytest.approx(expected)
    # It is not the mean of the rows.
    assert abs(found.value - sum(expected) / len(expected)) > 0.01


def test_chrf_is_sacrebleu_s_of_the_corpus() -> None:
    texts, references = zip(*SENTENCES, strict=True)
    found = scored("chrf")
    assert found.value == pytest.approx(corpus_chrf(texts, [references]).score / 100)
    assert found.rows == pytest.approx([sentence_chrf(t, [r]).score / 100 for t, r in SENTENCES])
    # One character n-gram F2 by hand: "ab" against "abc". Unigrams: precision 2/2, recall 2/3;
    # bigrams 1/1 and 1/2; there are no longer ones in the answer.
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2
    by_hand = 5 * precision * recall / (4 * precision + recall)
    assert scored("chrf", [("ab", "abc")]).value == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_interval_is_of_corpora(name: str) -> None:
    found = scored(name, SENTENCES * 6)
    interval = found.interval()
    assert interval.value == pytest.approx(found.value)
    assert 0 < interval.low < interval.value < interval.high < 1
    # White space at the ends, which a prompt's tokens leave to an answer, does not count.
    spaced = scored(name, [(f" {text}", f"{ref}\n") for text, ref in SENTENCES * 6])
    assert spaced.value == found.value


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def test_rouge_l_by_hand() -> None:
    found = scored("rouge_l")
    for (text, reference), value in zip(SENTENCES, found.rows, strict=True):
        a, b = text.split(), reference.split()
        common = longest_common(a, b)
        precision, recall = common / max(len(a), 1), common / len(b)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert value == pytest.approx(expected)
    assert found.value == pytest.approx(sum(found.rows) / len(SENTENCES))
    assert scored("rouge_l", [("Cats, RUN", "cats run")]).rows == [1.0]


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, *_: Any) -> None:
        return None if name in ("sacrebleu", "rouge_score") else __import__(name).__spec__

    monkeypatch.setattr("esft.measures.metric.find_spec", nothing)
    with pytest.raises(EsftError, match=r"chrf needs sacrebleu: pip install sacrebleu$"):
        check_metrics(["exact_match", "chrf"], allow_code=False)
    with pytest.raises(EsftError, match=r"rouge_l needs rouge-score: pip install rouge-score$"):
        check_metrics(["rouge_l"], allow_code=False)


def test_libraries_are_imported_only_where_they_are_needed() -> None:
    program = (
        "import sys, esft.measures.bleu, esft.measures.chrf, esft.measures.rouge_l; "
        "print([n for n in ('sacrebleu', 'rouge_score', 'nltk') if n in sys.modules])"
    )
    folder = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_code_is_not_run_unless_it_may_be() -> None:
    with pytest.raises(EsftError, match=r"pass_at_1 runs code .*allow_code: true \(--allow-code"):
        check_metrics(["pass_at_1"], allow_code=False)
    check_metrics(["pass_at_1"], allow_code=True)


def test_an_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(EsftError, match=r'no metric is called rouge; did you mean "rouge_l"\?'):
        check_metrics(["rouge"], allow_code=False)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\nx = 1\ny = 2\n```\nand\n```\nz = 3\n```\n", "x = 1\ny = 2\n"),
        ("```\nx = '```'\n```", "x = '```'\n"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_the_code_of_an_answer(text: str, expected: str) -> None:
    assert code(text) == expected


def test_tests_of_a_row() -> None:
    value = {"prompt": "p", "completion": "c", "tests": ["assert f() == 1", "assert f() != 2"]}
    row = make_row(value, "f:1", "prompt-completion")
    assert (row.tests, row.setup) == ("assert f() == 1\nassert f() != 2", "")
    row = make_row(value | {"tests": "pass", "setup": "import os\n"}, "f:1", "prompt-completion")
    assert (row.tests, row.setup) == ("pass", "import os\n")
    with pytest.raises(DataError, match=r"^f:1: .*`tests`"):
        make_row(value | {"tests": 7}, "f:1", "prompt-completion")
    with pytest.raises(DataError, match=r"^f:9: pass_at_1: the row has no `tests`"):
        check_rows("pass_at_1", [(Row("f:9"), "x")])

"""`esft eval` and `esft generate`: what they print, where, and how they refuse bad input."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from esft_cli import output

import esft as library
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, esft_process, refusal
from tests.toy_tokenizers import MISTRAL

GOOD = '{"prompt": "2+2=", "completion": "4"}\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", template=MISTRAL)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text(GOOD + '{"prompt": "3+4=", "completion": "7"}\n')
    return path


def test_eval_prints_a_table(checkpoint: Path, data: Path) -> None:
    expected = library.evaluate(checkpoint, data)
    lines = esft("eval", checkpoint, "--data", data).stdout.splitlines()
    shown = {line[:13].strip(): line[13:].strip() for line in lines}
    assert shown["exact match"].split("  ")[0] == "0.0 % (0 of 2)"
    assert shown["exact match"].split("  ")[-1].strip() == "0.0 % to 0.0 %"
    assert shown["loss"] == f"{expected.loss:.4f} nats a token"
    assert shown["perplexity"] == f"{expected.perplexity:.4g}"
    assert shown["answer tokens"] == "4"


def test_eval_prints_json(checkpoint: Path, data: Path) -> None:
    printed = esft_json("eval", checkpoint, "--data", data, "--max-rows", "1")
    assert printed == library.evaluate(checkpoint, data, max_rows=1).to_dict()


def test_eval_by_other_metrics_and_on_other_domains(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    general = tmp_path / "general"
    general.mkdir()
    (general / "words.jsonl").write_text('{"text": "some words"}\n')
    answers = tmp_path / "answers.jsonl"
    metrics = ("--metric", "chrf", "--metric", "rouge_l", "--max-new-tokens", "3")
    options = ("eval", checkpoint, "--data", data, *metrics, "--general", general)
    printed = esft_json(*options, "--answers", answers)
    expected = library.evaluate(
        checkpoint, data, metrics=["chrf", "rouge_l"], max_new_tokens=3, general=general
    )
    assert printed == expected.to_dict()
    assert list(printed["scores"]) == ["chrf", "rouge_l"]
    assert [json.loads(line) for line in answers.read_text().splitlines()] == expected.answers
    shown = esft(*options).stdout
    score = printed["scores"]["chrf"]
    for text in (
        f"{100 * score['value']:.1f} %",
        f"{100 * score['low']:.1f} % to {100 * score['high']:.1f} %",
        "rouge l",
        f"{printed['general_loss']:.4f} nats a token",
        f"{printed['general']['words']:.4f}",
    ):
        assert text in shown
    assert "--allow-code" in refusal("eval", checkpoint, "--data", data, "--metric", "pass_at_1")


def test_generate_prints_the_answer_alone(checkpoint: Path) -> None:
    answer = library.generate(checkpoint, "2+2=", max_new_tokens=5)
    options = ("generate", checkpoint, "--prompt", "2+2=", "--max-new-tokens", "5")
    assert esft(*options).stdout == answer + "\n"
    assert esft_json(*options) == {"prompt": "2+2=", "text": answer}
    assert esft_json(*options, "--chat")["text"] != answer


PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40"}


def test_eval_without_a_terminal_is_plain(checkpoint: Path, data: Path) -> None:
    result = esft_process("eval", checkpoint, "--data", data, "--json", **PLAIN)
    assert result.returncode == 0
    assert json.loads(result.stdout)["rows"] == 2
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr.startswith(f"{data}: prompt-completion, 2 rows\nscoring: 2/2 rows")
    assert "\x1b" not in result.stdout + result.stderr
    assert "\r" not in result.stderr


def test_help_fits_a_narrow_terminal() -> None:
    for verb in ("eval", "generate"):
        result = esft_process(verb, "--help", **PLAIN)
        assert result.returncode == 0
        assert max(map(len, result.stdout.splitlines())) <= 40
        assert "\x1b" not in result.stdout


def test_letters_that_the_terminal_lacks(checkpoint: Path) -> None:
    prompt = "größer 漢字"
    options = ("generate", checkpoint, "--prompt", prompt, "--max-new-tokens", "40")
    expected = library.generate(checkpoint, prompt, max_new_tokens=40)
    assert not expected.isascii()
    result = esft_process(*options, PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    escaped = expected.encode("ascii", errors="backslashreplace").decode()
    assert result.stdout == escaped + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_any_encoding(encoding: str) -> None:
    value = {"text": "größer 漢字"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with redirect_stdout(stream):
        output.print_json(value)
    stream.seek(0)
    assert json.loads(stream.read()) == value


BAD = {
    "broken JSON": (GOOD + '{"prompt": "a" "b"}\n', ":2: not JSON"),
    "cut off": (GOOD + '{"prompt": "a', ":2: not JSON: the line ends in the middle"),
    "no answer": (GOOD + '\n{"prompt": "a"}\n', ":3: a line without an answer"),
    "an empty answer": ('{"prompt": "a", "completion": ""}\n', ":1: a line without an answer"),
    "mixed formats": (
        GOOD + '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        ":2: a row with messages, but",
    ),
    "no rows": ("\n", ": no rows in it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str, tmp_path: Path) -> None:
    text, said = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    # The data is read before the model, so a bad line shows without waiting for one.
    assert refusal("eval", "no-such-model", "--data", path).startswith(f"error: {path}{said}")
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("verb", ["profile", "train"])
@pytest.mark.parametrize("name", BAD)
def test_bad_rows_leave_nothing_half_written(
    verb: str, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    text, said = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    out = tmp_path / "out"
    assert f"{path}{said}" in refusal(verb, checkpoint, "--data", path, "--out", out)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_conversation_that_the_template_refuses(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    turns = [{"role": role, "content": "a"} for role in ("user", "user", "assistant")]
    path.write_text(json.dumps({"messages": turns}))
    result = esft("eval", checkpoint, "--data", path)
    assert result.returncode == 1
    assert f"error: {path}:1: the chat template refuses these messages" in result.stderr


def test_missing_files(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal("eval", checkpoint, "--data", missing) == f"error: {missing}: no such data file"
    assert f"{missing}: no such folder" in refusal("eval", missing, "--data", data)
    assert f"{missing}: no such folder" in refusal("generate", missing, "--prompt", "a")
    for verb in (("eval", checkpoint, "--data", data), ("generate", checkpoint, "--prompt", "a")):
        result = esft(*verb, "--delta", missing)
        assert result.returncode == 1
        assert str(missing) in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_bad_options(checkpoint: Path, data: Path) -> None:
    evaluate, generate = ("eval", checkpoint, "--data", data), ("generate", checkpoint, "--prompt")
    assert "--max-rows 0" in refusal(*evaluate, "--max-rows", 0)
    assert "--dtype int8: choose one of" in refusal(*evaluate, "--dtype", "int8")
    assert "--device gpu9" in refusal(*evaluate, "--device", "gpu9")
    assert "--prompt is empty" in refusal(*generate, "")
    assert "--max-new-tokens 0" in refusal(*generate, "a", "--max-new-tokens", 0)
    assert "--temperature -1.0" in refusal(*generate, "a", "--temperature", -1)
    assert esft("eval", checkpoint).returncode == 2  # wrong usage: no --data

"""`esft data preview`: what it prints for people and for machines."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, refusal


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its weights, which are not needed."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of which one is there twice, one is too long for 30 tokens, and two are tested on."""
    pairs = [("2+2=", "4"), ("2+2=", "4"), ("3+3=", "6"), ("x" * 40, "y")]
    for name, rows in (("train", pairs), ("test", [*pairs[1:3], ("4+4=", "8")])):
        lines = [json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


SHORT = ["--set", "data.max_length=30"]


def test_marks_without_colours(base: Path, data: Path) -> None:
    result = esft("data", "preview", base, "--data", data / "train.jsonl", "--rows", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "{+learnt+} {=special token=}",
        "",
        f"{data / 'train.jsonl'}:1: 7 tokens, 2 learnt",
        "{=<s>=}2+2={+4{=</s>=}+}",
    ]
    assert "train.jsonl: prompt-completion, 4 rows" in result.stderr


def test_colours_say_the_same(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = ["data", "preview", base, "--data", data / "train.jsonl", "--rows", "1"]
    shown = esft(*command).stdout.splitlines()[-1]
    learnt = "".join(re.findall(r"\x1b\[[\d;]*30;42m(.*?)\x1b\[0m", shown))
    assert learnt == "4</s>"
    assert re.sub(r"\x1b\[[\d;]*m", "", shown).rstrip() == "<s>2+2=4</s>"
    monkeypatch.setenv("NO_COLOR", "1")
    assert esft(*command).stdout.splitlines()[-1].endswith("{=<s>=}2+2={+4{=</s>=}+}")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "{+4{=</s>=}+}" in esft(*command).stdout


def test_statistics(base: Path, data: Path) -> None:
    files = ["--data", data / "train.jsonl", "--eval", data / "test.jsonl"]
    command = ["data", "preview", base, *files, *SHORT, "--stats"]
    found = esft_json(*command, "--rows", 0)
    figures = found["statistics"]
    assert found["rows"] == []
    assert found["sources"]["train"] == [
        {"path": str(data / "train.jsonl"), "format": "prompt-completion", "rows": 4}
    ]
    expected = {"rows_encoded": 4, "rows": 3, "tokens": 21, "supervised": 6, "duplicates": 1}
    expected |= {"too_long": 1, "blocks": 1, "overlap": 2, "eval_rows": 3}
    assert {key: figures[key] for key in expected} == expected
    assert figures["fill"] == 21 / 30
    assert figures["truncation"]["dropped"] == 1
    text = esft(*command, "--rows", 0).stdout
    lines = {re.sub(r"\s\s+", ": ", line.strip()) for line in text.splitlines()}
    assert {
        "rows trained on: 3",
        "tokens: 21",
        "learnt: 6 tokens (28.6 %)",
        "lengths: 7 to 43, mean 16.0",
        "percentiles: p5 7, p25 7, p50 7, p75 7, p90 43, p95 43, p99 43",
        "above max_length: 1 rows (of 30)",
        "duplicates: 1 rows repeat an earlier one",
        "blocks: 1 of 30 tokens, 70.0 % filled",
        "also trained on: 2 of the test rows",
        "5-8: 3: " + "#" * 40,
        "31-32: 0: > max_length",
        "33-64: 1: " + "#" * 14 + " > max_length",
    } <= lines


def test_a_recipe_with_several_sources(base: Path, data: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (data / "alpaca.json").write_text(json.dumps([{"instruction": "Add 1 and 1.", "output": "2"}]))
    (data / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (data / "base").symlink_to(base)
    (data / "recipe.yaml").write_text(
        "model: base\ndata: {train: [train.jsonl, alpaca.json], packing: false}\n"
    )
    found = esft_json("data", "preview", data / "recipe.yaml", "--rows", 9)
    assert [(Path(s["path"]).name, s["format"], s["rows"]) for s in found["sources"]["train"]] == [
        ("train.jsonl", "prompt-completion", 4),
        ("alpaca.json", "alpaca", 1),
    ]
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        check(row)
    assert found["statistics"] is None
    chat = f"data.train={data / 'chat.jsonl'}"
    assert "messages need a chat template" in refusal(
        "data", "preview", data / "recipe.yaml", "--set", chat
    ).replace("\n", "")


def check(row: dict[str, Any]) -> None:
    """What is said of a row agrees with its labels."""
    assert len(row["labels"]) == row["tokens"] == len(row["input_ids"])
    assert row["learnt"] == sum(label != -100 for label in row["labels"]) > 0
    assert {label for label in row["labels"] if label != -100} <= set(row["input_ids"])


def test_rows_by_chance(base: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{n}", "completion": "x"}) + "\n" for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    command = ["data", "preview", base, "--data", tmp_path / "rows.jsonl", "--rows", "4"]
    drawn = [
        [row["where"] for row in esft_json(*command, *seed)["rows"]]
        for seed in ([], ["--seed", 1], ["--seed", 1], ["--seed", 2])
    ]
    assert [where.rpartition(":")[2] for where in drawn[0]] == ["1", "2", "3", "4"]
    assert drawn[1] == drawn[2] != drawn[3]


def test_refusals(base: Path, data: Path, tmp_path: Path) -> None:
    train = data / "train.jsonl"
    assert "give --data" in refusal("data", "preview", base)
    assert "no such data file" in refusal("data", "preview", base, "--data", data / "no.jsonl")
    (data / "bad.jsonl").write_text('{"prompt": "a"}\n')
    assert "bad.jsonl:1: " in refusal("data", "preview", base, "--data", data / "bad.jsonl")
    result = esft("data", "preview", base, "--data", train, "--rows", -1)
    assert result.stderr.splitlines()[-1] == "error: --rows -1: expected 0 or more"
    unknown = ["--data", train, "--set", "data.max_lenght=3"]
    assert 'did you mean "max_length"' in refusal("data", "preview", base, *unknown)
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal("data", "preview", bare, "--data", train)

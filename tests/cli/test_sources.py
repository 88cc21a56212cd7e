"""Whatever data there is, on the command line: formats, folders, splits, mixtures, bad rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.checkpoints import save_tiny
from tests.command import esft, esft_json, refusal
from tests.toy_tokenizers import MISTRAL

SCORED = ["--tokens", "200"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", template=MISTRAL)


def lines(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(text + "\n" for text in texts))
    return path


def pairs(count: int) -> list[Any]:
    return [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(count)]


def test_train_on_a_mixture_less_bad_rows(base: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", *pairs(5), "{", *pairs(5))
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    refused = {"conversations": [turns[0], *turns]}  # by the template
    lines(tmp_path / "b" / "train_1.jsonl", *[{"conversations": turns}] * 4, refused)
    lines(tmp_path / "b" / "train_2.jsonl", *[{"conversations": turns}] * 5)
    lines(tmp_path / "b" / "test.jsonl", "no row of this run")
    parquet.write_table(pyarrow.Table.from_pylist(pairs(12)), tmp_path / "test.parquet")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {base}\n"
        "selection: {top_n: 1, tokens: 200}\n"
        "data:\n"
        "  train: [{path: a.jsonl, weight: 1}, {path: b, split: train, weight: 1}]\n"
        "  eval: test.parquet\n"
        "  max_length: 64\n"
        "training: {max_steps: 2, learning_rate: 1e-2, save_strategy: steps, save_steps: 1}\n"
    )
    run = tmp_path / "run"
    said = refusal("train", recipe, "--out", run)
    assert f"{tmp_path}/a.jsonl:6: not JSON" in said
    assert not run.exists()
    result = esft("train", recipe, "--out", run, "--skip-bad", 1)
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert f"error: {tmp_path}/b/train_1.jsonl:5: the chat template refuses" in said
    assert "1 bad row skipped before this one, as many as --skip-bad 1 allows" in said
    assert not run.exists()

    result = esft("train", recipe, "--out", run, "--skip-bad", 2)
    assert result.returncode == 0, result.stderr
    for note in (
        f"{tmp_path}/a.jsonl: prompt-completion, 10 rows, 1 bad row skipped",
        f"{tmp_path}/b: sharegpt, 10 rows, 2 files, ignored test.jsonl",
        f"{tmp_path}/a.jsonl: 10 of the mixture's 20 rows, of 10 (weight 1 of 2)",
        f"{tmp_path}/test.parquet: prompt-completion, 12 rows",
        "5 of 12 rows of data.eval are in data.train, too",
        "2 bad rows skipped (--skip-bad 2)",
    ):
        assert note in result.stderr
    skipped = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["where"] for row in skipped] == [
        f"{tmp_path}/a.jsonl:6",
        f"{tmp_path}/b/train_1.jsonl:5",
    ]
    assert "roles must alternate" in skipped[1]["reason"]
    assert "skip_bad: 2" in (run / "recipe.yaml").read_text()
    assert f"`{tmp_path}/a.jsonl`, `{tmp_path}/b`" in (run / "README.md").read_text()
    scores = json.loads((run / "scores.json").read_text())
    assert scores["sample"]["tokens"] == 200

    # The same files elsewhere are the same data; others are not.
    (run / "delta").rename(tmp_path / "delta")
    (tmp_path / "b").rename(tmp_path / "c")
    moved = f"data.train=[{{path: {tmp_path}/a.jsonl, weight: 1}}, {{path: {tmp_path}/%s, "
    options = ["--skip-bad", 2, "--resume", "--set"]
    result = esft(
        "train", recipe, "--out", run, *options, moved % "c" + "split: train, weight: 1}]"
    )
    assert result.returncode == 0, result.stderr
    (run / "delta").rename(tmp_path / "again")
    result = esft(
        "train", recipe, "--out", run, *options, moved % "c" + "split: train, weight: 2}]"
    )
    assert result.returncode == 1
    assert "data.train.2.weight: 1.0 then, 2.0 now" in result.stderr


def test_profile_eval_and_mask_go_on_without_bad_rows(base: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", *pairs(4), "{}", {"prompt": "a", "completion": ""})
    clean = lines(tmp_path / "clean.jsonl", *pairs(4))
    scores, same = tmp_path / "new" / "scores.json", tmp_path / "same.json"
    assert f"{data}:5: found no keys" in refusal("profile", base, "--data", data, "--out", scores)
    result = esft("profile", base, "--data", data, "--out", scores, "--skip-bad", 2, *SCORED)
    assert result.returncode == 0, result.stderr
    listed = scores.parent / "bad_rows.jsonl"
    assert f"2 bad rows skipped, listed in {listed}" in result.stderr
    assert [json.loads(line)["where"] for line in listed.read_text().splitlines()] == [
        f"{data}:5",
        f"{data}:6",
    ]
    assert esft("profile", base, "--data", clean, "--out", same, *SCORED).returncode == 0
    assert not (tmp_path / "bad_rows.jsonl").exists()
    found, expected = (json.loads(path.read_text()) for path in (scores, same))
    assert found["layers"] == expected["layers"]

    assert f"{data}:5: found no keys" in refusal("eval", base, "--data", data)
    result = esft("eval", base, "--data", data, "--skip-bad", 2)
    assert result.returncode == 0, result.stderr
    assert f"skipped {data}:5: found no keys" in result.stderr
    assert f"skipped {data}:6: a line without an answer" in result.stderr
    for command, *options in (["eval"], ["mask", "--top", 1, "--draws", 1]):
        good = esft_json(command, base, "--data", clean, *options)
        assert esft_json(command, base, "--data", data, *options, "--skip-bad", 2) == good


def test_formats_and_splits_are_options(base: Path, tmp_path: Path) -> None:
    both = [row | {"text": "Once"} for row in pairs(3)]
    lines(tmp_path / "set" / "test.jsonl", *both)
    lines(tmp_path / "set" / "train.jsonl", *both * 2)
    folder = tmp_path / "set"
    assert "has files of the splits test, train" in refusal("eval", base, "--data", folder)
    chosen = ["--data", folder, "--split", "test"]
    assert "say which with data.format (--format)" in refusal("eval", base, *chosen)
    assert 'did you mean "text"?' in refusal("eval", base, *chosen, "--format", "texts")
    assert "config (--config) is for" in refusal("eval", base, *chosen, "--config", "main")
    text = esft_json("eval", base, *chosen, "--format", "text")
    assert (text["rows"], text["tokens"]) == (3, 3 * len("Once") + 3)
    pair = esft_json("eval", base, *chosen, "--format", "prompt-completion")
    assert (pair["rows"], pair["tokens"]) == (3, 6)
    out = tmp_path / "scores.json"
    esft_json("profile", base, *chosen, "--format", "text", "--out", out, *SCORED)
    sample = json.loads(out.read_text())["sample"]
    assert sample["data"] == str(folder)
    assert "error: --skip-bad -1: expected 0 or more" in refusal(
        "profile", base, *chosen, "--out", out, "--skip-bad", -1
    )

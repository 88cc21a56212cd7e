"""Reporters: what they get, where they write it, and what is refused before any work."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.errors import EsftError, RecipeError
from esft.run.reporting import reporting
from tests.checkpoints import save_tiny
from tests.command import esft_process

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    save_tiny(folder / "base", "qwen3_moe")
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n]} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def nobody_s_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home with no one logged in, nothing set, and a working directory of its own."""
    home = tmp_path / "home"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(home)
    return home


def recipe(material: Path, report_to: Any) -> dict[str, Any]:
    return {
        "model": str(material / "base"),
        "selection": {"tokens": 40},
        "data": {
            "train": str(material / "rows.jsonl"),
            "eval": str(material / "rows.jsonl"),
            "max_length": 32,
        },
        "training": {
            "report_to": report_to,
            "max_steps": 3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
    }


def logged(run: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def assert_close(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [x for _, x in found] == pytest.approx([x for _, x in expected], rel=1e-6)


def assert_within(run: Path, home: Path) -> None:
    """Nothing is written outside the run's folder, no secret in it, no setting left behind."""
    assert list(home.rglob("*")) == []
    for path in run.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert not any(name.startswith(("WANDB_D", "TRACKIO_", "TENSORBOARD_")) for name in os.environ)


def test_tensorboard_gets_what_is_logged(
    material: Path, tmp_path: Path, nobody_s_home: Path
) -> None:
    run = tmp_path / "run"
    esft.train(recipe(material, "tensorboard"), run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, key in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "eval_loss"),
        ("eval/exact_match", "eval_exact_match"),
    ):
        assert_close([(e.step, e.value) for e in events.Scalars(tag)], logged(run, key))
    assert len(logged(run, "loss")) == 3
    assert_within(run, nobody_s_home)


def test_its_own_variable_says_where(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    esft.train(recipe(material, ["tensorboard"]), tmp_path / "run")
    assert list((tmp_path / "mine").glob("events*"))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "mine")


def test_by_default_nobody_is_told(material: Path, tmp_path: Path) -> None:
    for name, asked in (("one", "none"), ("two", [])):
        esft.train(recipe(material, asked), tmp_path / name)
        assert {p.name for p in (tmp_path / name).iterdir() if p.is_dir()} == {"delta"}


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_gets_what_is_logged(material: Path, tmp_path: Path, nobody_s_home: Path) -> None:
    run = tmp_path / "run"
    esft.train(recipe(material, "trackio"), run)
    with sqlite3.connect(run / "trackio" / "esft.db") as base:
        rows = [
            (name, json.loads(text))
            for name, text in base.execute("select run_name, metrics from metrics order by id")
        ]
    assert {name for name, _ in rows} == {"run"}
    for tag, key in (("train/loss", "loss"), ("eval/exact_match", "eval_exact_match")):
        found = [(line["train/global_step"], line[tag]) for _, line in rows if tag in line]
        assert_close(found, logged(run, key))
    assert_within(run, nobody_s_home)


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Read what an offline run of wandb's holds: LevelDB's log format after a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header begins so near to a block's end
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)  # after a checksum
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_what_is_logged(
    material: Path,
    tmp_path: Path,
    nobody_s_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    esft.train(recipe(material, "wandb"), run)
    assert wandb.run is None  # or a next run would log into this one
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    lines = []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("esft", "run")
        items = record.history.item
        lines.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    for tag, key in (("train/loss", "loss"), ("eval/exact_match", "eval_exact_match")):
        found = [(line["train/global_step"], line[tag]) for line in lines if tag in line]
        assert_close(found, logged(run, key))
    assert_within(run, nobody_s_home)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_with_nobody_logged_in_is_refused(material: Path, tmp_path: Path) -> None:
    # In a process of its own: wandb remembers the mode that it was first used in.
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(material, "wandb")))
    result = esft_process("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert result.returncode == 1
    message = r"error: training\.report_to: wandb: No API key .* WANDB_MODE=offline logs"
    assert re.search(message, result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_json_stands_alone_on_stdout_whatever_libraries_print(
    material: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(material, "none")))
    arguments = ("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--json")
    result = esft_process(*arguments, WANDB_MODE="offline")  # which transformers prints
    assert result.returncode == 0, result.stderr
    assert "WANDB" in result.stderr
    assert json.loads(result.stdout)["steps"] == 3


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_one_that_is_not_installed_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    wanted = recipe(tmp_path, ["tensorboard", name])  # its model and rows are not there either
    message = rf"^training\.report_to: {name} is not installed; pip install {name}$"
    with pytest.raises(RecipeError, match=message):
        esft.train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tensorbord", 'tensorbord: not a reporter of esft\'s; did you mean "tensorboard"'),
        ("all", "all: not a reporter .*; choose among tensorboard, wandb, trackio"),
        (["mlflow"], "mlflow: not a reporter"),
    ],
)
def test_an_unknown_one_is_refused(asked: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"training\.report_to: {message}"):
        esft.train(recipe(tmp_path, asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_fails_in_a_reporter_is_said_to(tmp_path: Path) -> None:
    failed = type("CommError", (Exception,), {"__module__": "tensorboard.somewhere"})
    with (
        pytest.raises(EsftError, match=r"training\.report_to: tensorboard: .*no network"),
        reporting({"report_to": "tensorboard"}, tmp_path),
    ):
        raise failed("no network")
    with pytest.raises(KeyError), reporting({"report_to": "tensorboard"}, tmp_path):
        raise KeyError("ours")

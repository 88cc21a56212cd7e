"""`esft profile --stream`: the same file as without, an earlier one gone on from, faults told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import esft
from esft.errors import EsftError
from tests.checkpoints import save_tiny
from tests.command import esft as command
from tests.command import refusal
from tests.distributed.launcher import run, told
from tests.streaming.streams import Watching, interrupt


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "base", "deepseek_v2")
    rows = [{"prompt": f"say {n}", "completion": "word " * (n % 9 + 1)} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def profile(task: Path, out: Path, *options: str) -> str:
    """Run the command, which must succeed; return what it printed on stderr."""
    done = command("profile", task / "base", "--data", task / "rows.jsonl", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_file_is_the_same(task: Path, tmp_path: Path) -> None:
    for name, options in {
        "resident": ["--no-stream"],
        "streamed": ["--stream"],
        "in-a-file": ["--stream", "--hidden-memory", "1B"],
        "by-itself": [],
    }.items():
        said = profile(task, tmp_path / name, "--cooccurrence", *options)
        assert ("layer" in said) == bool(options and options[0] == "--stream")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["by-itself", "in-a-file", "resident", "streamed"]
    assert len({file.read_bytes() for file in files}) == 1


def test_an_interrupted_profile_is_gone_on_with(task: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "scores.json", tmp_path / "whole.json"
    arguments = (str(task / "base"), str(task / "rows.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        esft.profile(*arguments, stream=True, out=out, reporter=Watching(2, interrupt))
    assert [item.name for item in tmp_path.iterdir()] == ["scores.json.partial"]
    said = profile(task, out, "--stream")
    assert "2/3 layers" in said or "3/3 layers" in said
    assert "first layer" not in said
    assert [item.name for item in tmp_path.iterdir()] == ["scores.json"]
    profile(task, whole, "--no-stream")
    assert out.read_bytes() == whole.read_bytes()


def test_other_options_start_a_profile_of_their_own(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    with pytest.raises(KeyboardInterrupt):
        esft.profile(
            str(task / "base"),
            str(task / "rows.jsonl"),
            stream=True,
            out=out,
            reporter=Watching(1, interrupt),
        )
    said = profile(task, out, "--stream", "--tokens", "100", "--count", "completion")
    assert "it is of another profile (sample, count differ); starting from the first layer" in said
    profile(task, tmp_path / "whole.json", "--tokens", "100", "--count", "completion")
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_without_a_file_nothing_is_kept(task: Path, tmp_path: Path) -> None:
    found = esft.profile(str(task / "base"), str(task / "rows.jsonl"), stream=True, tokens=50)
    assert found == esft.profile(str(task / "base"), str(task / "rows.jsonl"), tokens=50)


def test_a_bad_amount_of_memory_is_told(task: Path, tmp_path: Path) -> None:
    error = refusal(
        *("profile", task / "base", "--data", task / "rows.jsonl", "--out", tmp_path / "s.json"),
        *("--stream", "--hidden-memory", "much"),
    )
    assert "--hidden-memory much: expected an amount such as" in error
    with pytest.raises(EsftError, match=r"--hidden-memory 0: must be above 0"):
        esft.profile("tiny-moe", "rows", hidden_memory=0)


def test_a_damaged_checkpoint_leaves_no_scores(task: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "deepseek_v2")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    out = tmp_path / "out" / "scores.json"
    data = ("--data", task / "rows.jsonl", "--out", out)
    assert str(file) in refusal("profile", tmp_path / "base", *data, "--stream")
    assert not out.exists()


def test_a_mixed_in_adapter_is_refused_as_without_streaming(task: Path, tmp_path: Path) -> None:
    data = ("--data", task / "rows.jsonl", "--out", tmp_path / "s.json")
    (tmp_path / "base").mkdir()
    for item in (task / "base").iterdir():
        (tmp_path / "base" / item.name).write_bytes(item.read_bytes())
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    errors = {
        refusal("profile", tmp_path / "base", *data, way) for way in ("--stream", "--no-stream")
    }
    assert len(errors) == 1
    assert "PEFT adapter" in errors.pop()


@pytest.mark.slow
def test_two_processes_stream_their_shares(task: Path, tmp_path: Path) -> None:
    program = ["-m", "esft_cli", "profile", str(task / "base"), "--data", str(task / "rows.jsonl")]
    ends = run([*program, "--stream", "--out", str(tmp_path / "shared.json")], tmp_path / "said")
    assert [end.code for end in ends] == [0, 0], told(ends)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those processes have
    profile(task, tmp_path / "alone.json", "--no-stream")
    torch.set_num_threads(threads)
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))

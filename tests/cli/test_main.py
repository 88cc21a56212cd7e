"""The command as a whole: its list of options, how fast it answers, one job from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from esft_cli.main import app
from safetensors.torch import load_file

from tests.checkpoints import save_tiny
from tests.command import ROOT, esft, esft_json, esft_process, python_process

# Every argument and option of every command. A new one belongs here, in docs/, and in CHANGELOG.md.
OPTIONS = {
    "demo": "--out --task --steps --json",
    "recipes": "--json",
    "init": "name --out --json",
    "inspect": "model --trust-remote-code --json",
    "profile": "model --data --out --tokens --seq-len --seed --count --cooccurrence --format "
    "--split --config --skip-bad --device --dtype --stream --hidden-memory "
    "--trust-remote-code --json",
    "select": "scores --out --metric --p --cover --mass --round --preset --top-n --budget "
    "--group --layers --random --random-from --json",
    "compare": "recipe --out --methods --seeds --learning-rates --sweep --jobs --set --dry-run "
    "--trust-remote-code --json",
    "plan": "recipe --data --method --selection --scores --set --memory --processes --load-in "
    "--probe --device --trust-remote-code --json",
    "train": "recipe --out --data --eval --test --method --selection --metric --p --steps --lr "
    "--set --skip-bad --deterministic --resume --device --trust-remote-code --json",
    "merge": "base deltas --out --on-conflict --json",
    "verify": "base deltas --merged --on-conflict --json",
    "unmerge": "merged delta --out --base --json",
    "export": "delta --out --base --compress --official --json",
    "import": "adapter --base --out --config --json",
    "eval": "model --data --harness --harness-path --delta --metric --max-new-tokens --general "
    "--answers --allow-code --max-rows --batch-tokens --format --split --config --skip-bad "
    "--device --dtype --expert-memory --expert-bits --speculate --out --trust-remote-code --json",
    "generate": "model --prompt --delta --max-new-tokens --temperature --seed --chat --device "
    "--dtype --expert-memory --expert-bits --speculate --trust-remote-code --json",
    "mask": "model --data --top --scores --metric --draws --seed --delta --max-rows --batch-tokens "
    "--format --split --config --skip-bad --device --dtype --trust-remote-code --json",
    "report": "path --out --selection --json",
    "data preview": "recipe --data --eval --rows --seed --stats --set --trust-remote-code --json",
    "scores import": "path --out --top-k --experts --json",
    "scores diff": "a b --metric --p --json",
    "scores overlap": "files --metric --p --plot --json",
}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_no_option_appears_or_goes_unnoticed() -> None:
    found = {
        name: " ".join(option for parameter in command.params for option in parameter.opts)
        for name, command in commands(typer.main.get_command(app))
    }
    assert found == OPTIONS


def test_every_command_and_option_is_explained() -> None:
    for name, command in commands(typer.main.get_command(app)):
        assert len(command.help) > 20, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.opts}"
            assert len(parameter.help) > 10, f"{name} {parameter.opts}"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval"]])
def test_help_and_usage_errors_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['esft', *sys.argv[1:]]\n"
        "from esft_cli.main import run\n"
        "try: run()\n"
        "finally: print('IMPORTED', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = python_process("-c", code, *arguments)
    assert "IMPORTED []" in result.stdout
    assert result.returncode == (0 if "--help" in arguments else 2)


@pytest.mark.parametrize(
    ("arguments", "about"),
    [
        (["train"], "RECIPE|MODEL"),
        (["train", "r.yaml"], "--out"),
        (["train", "r.yaml", "--out", "x", "--learning-rate", "1"], "--learning-rate"),
        (["train", "r.yaml", "--out", "x", "--p", "much"], "--p"),
        (["train", "r.yaml", "--out", "x", "--steps", "1.5"], "--steps"),
        (["merge", "base"], "DELTA"),
        (["merge", "base", "delta"], "--out"),
        (["verify"], "BASE"),
        (["trian"], "trian"),
    ],
)
def test_wrong_usage(
    arguments: list[str], about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = esft(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert about in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `base` and a task it can learn, in `train.jsonl`."""
    folder = tmp_path_factory.mktemp("task")
    save_tiny(folder / "base", "deepseek_v2")
    rows = [{"prompt": f"{n}:", "completion": "abcdef"[n % 6]} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    return folder


def test_the_whole_job(task: Path, tmp_path: Path) -> None:
    base, data = task / "base", task / "train.jsonl"
    scores, selection = tmp_path / "scores.json", tmp_path / "selection.json"
    assert esft_json("inspect", base)["model_type"] == "deepseek_v2"
    assert esft_json("profile", base, "--data", data, "--out", scores)["out"] == str(scores)
    picked = esft_json("select", scores, "--out", selection, "--metric", "gate", "--p", "0.9")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {base}\nselection: selection.json\n"
        f"data: {{train: {data}, eval: {data}, max_length: 32}}\n"
        "training: {max_steps: 60, learning_rate: 3e-2, per_device_train_batch_size: 8, seed: 0}\n"
    )
    run, merged = tmp_path / "run", tmp_path / "merged"
    trained = esft_json("train", tmp_path / "recipe.yaml", "--out", run)
    assert trained["delta"] == str(run / "delta")
    assert trained["trained"] == picked["summary"]["parameters"]
    assert trained["delta_bytes"] == (run / "delta" / "esft_delta.safetensors").stat().st_size
    assert esft_json("merge", base, run / "delta", "--out", merged)["merged"] == str(merged)
    verified = esft_json("verify", base, run / "delta", "--merged", merged)
    assert verified["ok"]
    assert verified["merged"] == verified["tensors"] == len(load_file(merged / "model.safetensors"))
    before = esft_json("eval", base, "--data", data)
    after = esft_json("eval", merged, "--data", data)
    assert before["exact_match"] == 0
    assert after["exact_match"] > 0.9
    assert after == esft_json("eval", base, "--delta", run / "delta", "--data", data)
    assert after["matched"] == trained["evaluation"]["matched"]
    assert esft_json("generate", merged, "--prompt", "3:")["text"] == "d"
    # Without a recipe: profile, select and train at once, to the same experts.
    options = ["--data", data, "--metric", "gate", "--p", "0.9", "--steps", "3", "--lr", "1e-2"]
    esft_json("train", base, *options, "--set", "data.max_length=32", "--out", tmp_path / "again")
    experts = [
        json.loads((folder / "selection.json").read_text())["experts"]
        for folder in (run, tmp_path / "again")
    ]
    assert experts[0] == experts[1]
    resolved = (tmp_path / "again" / "recipe.yaml").read_text()
    for line in ("  metric: gate", "  p: 0.9", "  max_steps: 3", "  learning_rate: 0.01"):
        assert line in resolved.splitlines()


def test_json_is_all_that_is_on_stdout(task: Path, tmp_path: Path) -> None:
    # LoRA brings in PEFT, whose output is not ours; a process of its own, to see all of it.
    run, merged = tmp_path / "run", tmp_path / "merged"
    options = ["--data", task / "train.jsonl", "--method", "lora", "--steps", "2"]
    for arguments, key in (
        (["train", task / "base", *options, "--out", run], "delta"),
        (["merge", task / "base", run / "delta", "--out", merged], "merged"),
    ):
        result = esft_process(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == 1
        assert Path(json.loads(result.stdout)[key]).is_dir()
        assert "Warning" not in result.stderr
        assert "Loading weights" not in result.stderr
    assert "training" not in result.stderr


def test_tables_for_people(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = task / "train.jsonl"
    options = ["--data", data, "--eval", data, "--steps", "2", "--p", "0.2", "--out", run]
    result = esft("train", task / "base", *options)
    assert result.returncode == 0
    for words in ("trained by esft", "parameters trained", "exact match", "next: esft merge"):
        assert words in result.stdout
    assert "training: 2/2 steps" in result.stderr
    result = esft("merge", task / "base", run / "delta", "--out", tmp_path / "merged")
    assert result.stdout == f"merged checkpoint: {tmp_path / 'merged'}\n"
    result = esft("verify", task / "base", run / "delta", "--merged", tmp_path / "merged")
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "base",
        "delta",
        "merged",
    ]


def test_an_interrupted_run(task: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = os.pathsep.join(str(ROOT / part) for part in ("", "cli", "kernels"))
    arguments = [task / "base", "--data", task / "train.jsonl", "--steps", "100000", "--out", run]
    process = subprocess.Popen(
        [sys.executable, "-m", "esft_cli", "train", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: what a shell starts in the background ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert not (run / "delta").exists()

"""X5: access tokens of the environment, or where none belongs, are neither written nor shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from esft.secrets import HIDDEN
from tests.checkpoints import save_tiny
from tests.command import esft, esft_process

# Of the form that the hub and Weights & Biases give them; neither was ever given to anyone.
HF, WANDB = "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNm12345678", "0123456789abcdef" * 2 + "01234567"
ROWS = "".join(json.dumps({"prompt": f"{n}:", "completion": "ab"}) + "\n" for n in range(8))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return tmp_path


def check_clean(text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    for token in (HF, WANDB):
        assert token.encode() not in data
        assert token[5:-5].encode() not in data


def files_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_x5_tokens_of_the_environment(task: Path) -> None:
    """Logs at their most talkative, every file of a run, its merge, a reporter's files."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_SECRET")
    tokens = {name: WANDB if name == "WANDB_API_KEY" else HF for name in names}
    run, saving = task / "run", ["--set", "training.save_strategy=steps"]
    options = ["--data", task / "rows.jsonl", "--eval", task / "rows.jsonl", "--steps", 2]
    options += ["--set", "data.max_length=16", "--set", "training.report_to=tensorboard"]
    ran = esft_process(
        *("train", task / "base", *options, *saving, "--set", "training.save_steps=1"),
        *("--out", run, "--json"),
        **tokens,
        TRANSFORMERS_VERBOSITY="debug",
        HF_DEBUG="1",
        HF_HUB_VERBOSITY="debug",
        HF_HOME=str(task / "home"),
        TENSORBOARD_LOGGING_DIR=str(run / "logs"),
    )
    assert ran.returncode == 0, ran.stderr
    check_clean(ran.stdout + ran.stderr)
    assert esft("merge", task / "base", run / "delta", "--out", task / "merged").returncode == 0
    written = list(files_of(task))
    names_written = {path.name for path in written}
    assert {"README.md", "recipe.yaml", "metrics.jsonl", "esft_config.json"} <= names_written
    assert any(path.name.startswith("events.out.tfevents") for path in written)
    for path in written:
        check_clean(path.read_bytes())


@pytest.mark.parametrize("where", ["recipe", "option"])
def test_x5_a_token_in_a_recipe_is_refused_unshown(
    where: str, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB)
    plain = {"model": str(task / "base"), "data": {"train": "rows.jsonl", "max_length": 16}}
    recipe = task / "recipe.yaml"  # YAML takes JSON
    for key, value in (
        ("model", f"https://user:{HF}@huggingface.co/someone/model"),
        ("model", f"https://user:{WANDB}@huggingface.co/someone/model"),
        ("model", f"https://huggingface.co/someone/model?token={HF}"),
        ("data.train", f"https://{HF}@huggingface.co/datasets/someone/rows"),
        ("training.hub_token", HF),
        ("training.hub_token", "of no known form"),
        ("training.run_name", f"key {WANDB}"),
        ("training.lr_scheduler_kwargs", {"a": HF}),
        ("selection", HF),
    ):
        changed: dict[str, Any] = json.loads(json.dumps(plain))
        more: list[str] = []
        if where == "recipe":
            section, _, name = key.partition(".")
            changed |= {section: changed.get(section, {}) | {name: value} if name else value}
        else:
            more = ["--set", f"{key}={json.dumps(value)}"]
        recipe.write_text(json.dumps(changed))
        result = esft("train", recipe, *more, "--out", task / "run")
        assert result.returncode == 1, key
        error = result.stderr.splitlines()[-1]
        assert error.startswith("error: "), error
        assert key in error
        assert "HF_TOKEN" in error
        check_clean(result.stdout + result.stderr)
        assert "of no known form" not in error
        assert not (task / "run").exists()


class Hub(BaseHTTPRequestHandler):
    """Refuses everything, and repeats whatever it was told."""

    def do_GET(self) -> None:
        said = json.dumps(
            {"error": f"no, {self.headers.get('Authorization')} {self.path}"}
        ).encode()
        self.send_response(400)
        self.send_header("X-Error-Message", f"no, {self.headers.get('Authorization')} {self.path}")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def test_x5_errors_repeat_no_token(task: Path) -> None:
    """A hub that says in its error what it was sent; an address with a password as MODEL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = esft_process(
            *("eval", "someone/model", "--data", task / "rows.jsonl"),
            HF_TOKEN=HF,
            HF_HUB_OFFLINE="0",
            HF_HOME=str(task / "home"),
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        )
        server.shutdown()
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith("error: someone/model: ")
    check_clean(ran.stdout + ran.stderr)
    for model in (f"https://user:{HF}@hub/model", f"https://user:swordfish@hub/{HF}"):
        for command in (["inspect", model], ["eval", model, "--data", task / "rows.jsonl"]):
            result = esft(*command)
            assert result.returncode == 1
            assert HIDDEN in result.stderr
            assert "swordfish" not in result.stderr
            check_clean(result.stderr)

"""E4: a hub that cannot be reached or refuses, with and without a cached copy.

The hub is a server on this machine; the caches are laid out as huggingface_hub and datasets do.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.command import python_process

# In a process of its own: the libraries read their settings when they are imported.
SCRIPT = """
import json, sys
from esft.data.rows import read_rows
from esft.errors import EsftError
from esft.locating import resolve

def outcome(kind, name):
    try:
        if kind == "model":
            return str(resolve(name))
        return [row.where for row in read_rows(name)]
    except EsftError as error:
        return "error: " + str(error)

print(json.dumps([outcome(*ask) for ask in json.loads(sys.argv[1])]))
"""
NAMES = ("missing", "private", "gated", "cached")
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers every question about a repository with the error that its name asks for."""

    def do_GET(self) -> None:
        name = self.path.partition("/someone/")[2].split("/")[0].split("?")[0]
        code, error = {
            "missing": (404, "RepoNotFound"),
            "private": (401, "RepoNotFound"),
            "gated": (403, "GatedRepo"),
            "cached": (401, "RepoNotFound"),  # it was public once
        }[name]
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


def fill_cache(home: Path) -> None:
    """Put the model and the data set `someone/cached` into a cache."""
    model = home / "hub" / "models--someone--cached"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    source = home / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    made = home / "made"
    datasets.load_dataset("json", data_files=str(source), cache_dir=str(made))
    (arrow,) = made.rglob("*.arrow")
    copy = home / "datasets" / "someone___cached" / "default" / "0.0.0" / COMMIT
    copy.mkdir(parents=True)
    shutil.copy(arrow, copy / "cached-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "cached"}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_cache(folder)
    return folder


def ask(home: Path, *kinds: str, **environment: str) -> dict[tuple[str, str], Any]:
    """Ask for each of the names as a model and as a data set; return what came of it."""
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    asked = [(kind, name) for kind in kinds for name in NAMES]
    questions = json.dumps([(kind, f"someone/{name}") for kind, name in asked])
    ran = python_process("-c", SCRIPT, questions, **settings, **environment)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(asked, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def offline(home: Path) -> dict[tuple[str, str], Any]:
    return ask(home, "model", "dataset", HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def refusing(home: Path) -> dict[tuple[str, str], Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = ask(home, "model", "dataset", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        server.shutdown()
    return found


def check_copies(home: Path, found: dict[tuple[str, str], Any]) -> None:
    assert found["model", "cached"].startswith(str(home))
    assert found["model", "cached"].endswith(COMMIT)
    if ("dataset", "cached") in found:
        assert found["dataset", "cached"] == ["someone/cached:train[0]"]


def test_e4_offline_and_no_copy(offline: dict[tuple[str, str], Any]) -> None:
    for kind, what in (("model", "no such folder"), ("dataset", "no such file or folder")):
        assert offline[kind, "missing"].startswith(
            f"error: someone/missing: {what}, and the hub cannot be reached and has no cached copy"
        )


def test_e4_offline_and_a_copy(home: Path, offline: dict[tuple[str, str], Any]) -> None:
    check_copies(home, offline)


def test_e4_not_found(refusing: dict[tuple[str, str], Any]) -> None:
    assert "no such model on the hub" in refusing["model", "missing"]
    assert "no such data set on the hub" in refusing["dataset", "missing"]


def test_e4_not_allowed(refusing: dict[tuple[str, str], Any]) -> None:
    """401, which the hub also answers for what is private, and 403 for what has terms."""
    for kind in ("model", "dataset"):
        assert "a private one needs: hf auth login" in refusing[kind, "private"]
        assert "accept them on its page, then run: hf auth login" in refusing[kind, "gated"]
        for name in NAMES[:3]:
            assert refusing[kind, name].startswith(f"error: someone/{name}: ")
            assert "\n" not in refusing[kind, name]


def test_e4_not_allowed_any_more_and_a_copy(
    home: Path, refusing: dict[tuple[str, str], Any]
) -> None:
    check_copies(home, refusing)


def test_e4_nothing_listens(home: Path) -> None:
    """Models only: datasets tries again and again for half a minute."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    found = ask(home, "model", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
    assert "the hub cannot be reached and has no cached copy here" in found["model", "missing"]
    check_copies(home, found)

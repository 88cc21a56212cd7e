"""Loading a checkpoint: what is refused, before any of it can do harm, and how it says so."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import ModelError
from esft.loading import (
    load_config,
    load_model,
    load_skeleton,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
)
from tests.checkpoints import save_tiny
from tests.models import FAMILIES, tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(load: Callable[[Any], Any], argument: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(argument)
    message = str(caught.value)
    assert "\n" not in message
    return message


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_those_that_were_saved(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert not loaded.training
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    shapes = {name: tensor.shape for name, tensor in load_skeleton(tmp_path).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.items()}


def test_dtypes(saved: Path) -> None:
    cpu = torch.device("cpu")
    assert load_model(saved, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == pick_dtype("checkpoint", cpu) == "auto"
    with pytest.raises(ModelError, match="--dtype int8: choose one of auto, checkpoint, float32"):
        pick_dtype("int8", cpu)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "meta"])
def test_devices_that_are_none(name: str) -> None:
    assert refused(pick_device, name).startswith(f"--device {name}:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_here() -> None:
    assert refused(pick_device, "cuda").startswith("--device cuda: not usable here: ")
    assert pick_device(None) == torch.device("cpu")


# Which folder


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("", "no model: give a checkpoint's folder"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("../nowhere/at/all", "../nowhere/at/all: no such folder"),
        ("https://huggingface.co/a/b", "no such folder; give a checkpoint's folder or a hub id"),
        ("~no_such_user/model", "~no_such_user/model: cannot look for this folder"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "no such folder"),
    ],
)
def test_folders_that_are_none(model: str, said: str) -> None:
    assert said in refused(resolve, model)


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert (
        refused(resolve, tmp_path) == f"{tmp_path}: no config.json in this folder; not a checkpoint"
    )


def test_a_file_is_no_folder(saved: Path) -> None:
    assert "no such folder" in refused(resolve, saved / "config.json")


# Weights


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("indexed", [False, True])
def test_pickled_weights_are_refused_unread(
    indexed: bool, checkpoint: Path, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    (checkpoint / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if indexed else "pytorch_model.bin"
    (checkpoint / name).write_bytes(pickle.dumps({"weight": Canary(canary)}))
    if indexed:
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "safetensors" in refused(load_model, checkpoint)
    assert not canary.exists()
    pickle.loads((checkpoint / name).read_bytes())  # the canary does sing
    assert canary.exists()


@pytest.mark.parametrize("part", ["esft", "cli", "kernels"])
def test_no_code_here_reads_pickles(part: str) -> None:
    """Nothing imports a module that unpickles, and nothing calls torch.load."""
    for path in (ROOT / part).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            for name in names:
                assert name.split(".")[0] not in {"pickle", "dill", "shelve", "joblib"}, path
                assert name != "torch.load", path


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_weights_file_is_named(kept: int, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(load_model, checkpoint).startswith(f"{file}: this weights file is damaged")


def test_the_damaged_one_of_several_is_named(checkpoint: Path) -> None:
    tiny("qwen3_moe", vocab_size=300).save_pretrained(checkpoint, max_shard_size="60KB")
    (checkpoint / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 3
    shards[2].write_bytes(shards[2].read_bytes()[:-3])
    assert refused(load_model, checkpoint).startswith(f"{shards[2]}: ")
    shards[2].unlink()
    assert shards[2].name in refused(load_model, checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    message = refused(load_model, checkpoint)
    assert message.startswith(f"{checkpoint}: cannot load this checkpoint")
    assert "model.safetensors" in message


def remove_tensor(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_missing_tensor_is_not_made_up(checkpoint: Path) -> None:
    remove_tensor(checkpoint, "model.norm.weight")
    message = refused(load_model, checkpoint)
    assert message.startswith(f"{checkpoint}: the checkpoint lacks 1 of the model's tensors")
    assert "model.norm.weight" in message


def test_weights_of_another_architecture(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "the checkpoint lacks" in refused(load_model, checkpoint)


def test_a_missing_expert(checkpoint: Path) -> None:
    remove_tensor(checkpoint, "model.layers.1.mlp.experts.3.up_proj.weight")
    assert "not those that its config.json asks for" in refused(load_model, checkpoint)


def test_a_tensor_of_another_shape(checkpoint: Path) -> None:
    configure(checkpoint, vocab_size=200)
    assert "of another shape" in refused(load_model, checkpoint)


def test_an_adapter_beside_the_weights(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "holds a PEFT adapter" in refused(load_model, checkpoint)


# Configuration


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\x00", '{"model_type": "martian"}'])
def test_configurations_that_are_none(text: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(text)
    for load in (load_config, load_model, load_skeleton):
        assert refused(load, checkpoint).startswith(f"{checkpoint}: cannot load this checkpoint: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", "x"), ("hidden_size", -1), ("num_experts", None), ("hidden_act", "nope")],
)
def test_configurations_that_make_no_sense(key: str, value: Any, checkpoint: Path) -> None:
    configure(checkpoint, **{key: value})
    message = refused(load_model, checkpoint)
    assert message.startswith(f"{checkpoint}: cannot load this checkpoint: ")
    assert key in message or str(value) in message


EVIL = """
import os
os.mkdir({path!r})
from transformers import PretrainedConfig
class Config(PretrainedConfig):
    model_type = "martian"
"""


@pytest.fixture
def evil(checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    """A checkpoint that brings code of its own."""
    canary = tmp_path / "canary"
    (checkpoint / "evil.py").write_text(EVIL.format(path=str(canary)))
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    configure(checkpoint, model_type="martian", auto_map=auto_map)
    yield checkpoint
    assert not canary.exists()


def test_code_of_a_checkpoint_is_not_run(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A person who types y at a prompt does not run it either: there is no prompt.
    monkeypatch.setattr("builtins.input", lambda *text: "y")
    for load in (load_config, load_model, load_skeleton):
        assert "it needs code of its own (auto_map)" in refused(load, evil)


def test_code_that_transformers_replaces_is_not_run(evil: Path) -> None:
    """DeepSeek's checkpoints bring code that transformers has had built in since."""
    configure(evil, model_type="qwen3_moe")
    assert type(load_model(evil)).__module__.startswith("transformers.")


def test_code_of_a_tokenizer_is_not_run(evil: Path) -> None:
    configure(evil, model_type="qwen3_moe")
    path = evil / "tokenizer_config.json"
    changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert type(load_tokenizer(evil)).__module__.startswith("transformers.")


# Tokenizer


def test_no_tokenizer(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    assert refused(load_tokenizer, tmp_path).startswith(f"{tmp_path}: no tokenizer in this folder")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "1.0"}', "\x00"])
def test_tokenizers_that_are_none(text: str, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text(text)
    message = refused(load_tokenizer, checkpoint)
    assert message.startswith(f"{checkpoint}: cannot load this tokenizer: ")


# The hub


RESOLVE = """
import sys
from esft.errors import EsftError
from esft.locating import resolve
for model in sys.argv[1:]:
    try:
        print(resolve(model))
    except EsftError as error:
        print(error)
"""


def resolve_in_process(*models: str, **environment: str) -> list[str]:
    """Resolve hub ids in a process of its own: the hub's settings are read at import."""
    ran = subprocess.run(
        [sys.executable, "-c", RESOLVE, *models],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_offline(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--someone--cached" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "hub" / "models--someone--cached" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    started = time.monotonic()
    missing, typo, cached = resolve_in_process(
        *("someone/missing", "tiny_moe", "someone/cached"),
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert missing == (
        "someone/missing: no such folder, and the hub cannot be reached and has no cached copy here"
    )
    assert typo.endswith('; did you mean "tiny-moe"?')
    assert cached == str(snapshot)
    assert time.monotonic() - started < 60  # importing the libraries is most of it


class Hub(BaseHTTPRequestHandler):
    """A hub that has nothing, and says so as the real one does."""

    def do_GET(self) -> None:
        code, error = {
            "missing": (404, "RepoNotFound"),
            "gated": (403, "GatedRepo"),
            "private": (401, "RepoNotFound"),
        }[self.path.split("/")[4]]
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


def test_what_the_hub_refuses(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        missing, gated, private = resolve_in_process(
            *("someone/missing", "someone/gated", "someone/private"),
            HF_HUB_OFFLINE="0",
            HF_HOME=str(tmp_path),
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        )
        server.shutdown()
    assert missing.startswith("someone/missing: no such folder, and no such model on the hub")
    assert gated.startswith("someone/gated: the hub gives this model only to those who accepted")
    assert "hf auth login" in gated
    assert private.startswith("someone/private: no such folder, and no such model on the hub")

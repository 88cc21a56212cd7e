"""A plan of a model on the hub reads the headers of its files there, and no more of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.shards import INDEX, SINGLE
from tests.checkpoints import save_tiny
from tests.command import python_process
from tests.model_hub import Hub, served

# In a process of its own: huggingface_hub reads its settings when it is imported.
SCRIPT = """
import json, sys
import esft
from esft.errors import EsftError

def outcome(name):
    recipe = {"model": name, "method": "lora", "data": {"train": "absent.jsonl", "max_length": 32}}
    try:
        found = esft.plan(recipe, device="cuda")
        return {"stored": found.stored.to_dict(), "total": found.total, "notes": found.notes}
    except EsftError as error:
        return "error: " + str(error)

print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
"""
NAMES = ("sharded", "single", "closed", "bare", "lacking", "damaged")


def ask(home: Path, *names: str, **environment: str) -> dict[str, Any]:
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    asked = [f"someone/{name}" for name in names]
    ran = python_process("-c", SCRIPT, *asked, **settings, **environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    return {name: found[f"someone/{name}"] for name in names}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories: a model in two files with some of it in fp32, and variations of it."""
    folder = tmp_path_factory.mktemp("repositories")
    single = save_tiny(folder / "single")
    weights = {
        name: value if "norm" in name else value.bfloat16()
        for name, value in load_file(single / SINGLE).items()
    }
    save_file(weights, single / SINGLE, {"format": "pt"})
    config = single / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    sharded = Path(shutil.copytree(single, folder / "sharded"))
    (sharded / SINGLE).unlink()
    index = {"metadata": {}, "weight_map": {}}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        # Longer than what is asked for at first.
        padding = {f"unused.{number}": torch.zeros(200_000, dtype=torch.bfloat16)}
        save_file({name: weights[name] for name in names} | padding, sharded / file)
        index["weight_map"] |= dict.fromkeys([*names, *padding], file)
    (sharded / INDEX).write_text(json.dumps(index))
    for name in ("closed", "lacking", "damaged"):
        shutil.copytree(sharded, folder / name)
    (folder / "lacking" / "model-00002-of-00002.safetensors").unlink()
    (folder / "damaged" / "model-00002-of-00002.safetensors").write_bytes(b"\x10" * 99)
    bare = Path(shutil.copytree(single, folder / "bare"))
    (bare / SINGLE).unlink()
    return folder


@pytest.fixture(scope="module")
def asked(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Hub]:
    with served({f"someone/{name}": made / name for name in NAMES}) as hub:
        home = tmp_path_factory.mktemp("home")
        return ask(home, *NAMES, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.endpoint), hub


def test_headers_are_read_and_nothing_else(asked: tuple[dict[str, Any], Hub], made: Path) -> None:
    found, hub = asked
    for name in ("sharded", "single"):
        dtypes = {"BF16": 0, "F32": 0}
        count = 0
        for file in (made / name).glob("*.safetensors"):
            for tensor in load_file(file).values():
                dtypes["F32" if tensor.dtype == torch.float32 else "BF16"] += tensor.nbytes
                count += 1
        stored = found[name]["stored"]
        assert stored["measured"]
        assert stored["dtypes"] == dtypes
        assert (stored["bytes"], stored["tensors"]) == (sum(dtypes.values()), count)
        assert not any("configuration's" in note for note in found[name]["notes"])
    # The first 100 kB of each of two files of 400 kB and more.
    assert 0 < hub.given["someone/sharded"] <= 2 * 100_001


def test_where_there_are_none_it_says_so(asked: tuple[dict[str, Any], Hub]) -> None:
    found, _ = asked
    for name, why in (
        ("bare", "the hub has no safetensors files of it"),
        ("closed", "the hub does not give its headers"),
    ):
        stored = found[name]["stored"]
        assert not stored["measured"]
        assert stored["bytes"] == 2 * found[name]["total"]
        (note,) = (note for note in found[name]["notes"] if "configuration's" in note)
        assert note.startswith(why)


def test_a_repository_at_fault(asked: tuple[dict[str, Any], Hub]) -> None:
    found, _ = asked
    file = "model-00002-of-00002.safetensors"
    assert found["lacking"].startswith(f"error: someone/lacking: {file}: the index names this")
    assert found["damaged"].startswith(f"error: someone/damaged: {file}: this weights file is dam")


def test_a_model_in_the_cache_without_weights(
    made: Path, asked: tuple[dict[str, Any], Hub], tmp_path: Path
) -> None:
    """Without a network: what is here tells, files or the configuration."""
    hub = tmp_path / "hub"
    for name in ("sharded", "bare"):
        model = hub / f"models--someone--{name}"
        shutil.copytree(made / name, model / "snapshots" / ("b" * 40))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("b" * 40)
    found = ask(tmp_path, "sharded", "bare", HF_HUB_OFFLINE="1")
    assert found["sharded"]["stored"] == asked[0]["sharded"]["stored"]
    assert not found["bare"]["stored"]["measured"]
    assert any("the hub cannot be reached" in note for note in found["bare"]["notes"])

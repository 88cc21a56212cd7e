"""E3: memory that runs out while training. On a GPU; and on a CPU, by a limit of addresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esft.errors import EsftError
from esft.recipe import make_recipe
from esft.run.fields import with_defaults
from esft.run.memory import peak_memory
from esft.run.out_of_memory import explain_out_of_memory
from tests.checkpoints import save_tiny
from tests.command import Argument, esft, python_process

# Blocks are filled up to it, and their attention mask has its square of places: 4 GiB
LENGTH = 65_536


@pytest.fixture
def task(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base")
    rows = "".join(json.dumps({"prompt": f"{n}:", "completion": "ab"}) + "\n" for n in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    return tmp_path


def command(task: Path, method: str = "esft", batch: int = 1) -> list[Argument]:
    settings = [f"data.max_length={LENGTH}", f"training.per_device_train_batch_size={batch}"]
    options: list[Argument] = ["--data", task / "rows.jsonl", "--steps", 2, "--method", method]
    for setting in settings:
        options += ["--set", setting]
    return ["train", task / "base", *options, "--out", task / "run"]


def check(error: str, device: str) -> None:
    assert error.startswith(f"error: {device} ran out of memory in step 1: ")
    assert "GB were in use at most" in error
    assert f"of up to {LENGTH:,} tokens; lower " in error
    assert "data.max_length" in error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory runs out")
@pytest.mark.parametrize(("method", "batch"), [("esft", 1), ("esft", 2), ("lora", 1), ("full", 1)])
def test_e3_a_gpu(method: str, batch: int, task: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2e9 / total))
    try:
        result = esft(*command(task, method, batch), "--device", "cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    check(error, "cuda:0")
    assert ("per_device_train_batch_size" in error) == (batch > 1)
    assert not (task / "run" / "delta").exists()


SCRIPT = """
import resource, sys
import esft, esft.training
from pathlib import Path
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from esft_cli.main import run
run()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_more_memory_of_a_cpu_runs_out(task: Path) -> None:
    ran = python_process("-c", SCRIPT, *command(task), "--device", "cpu")
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    check(ran.stderr.splitlines()[-1], "cpu")
    assert not (task / "run" / "delta").exists()


def explained(error: Exception, **data: int) -> str:
    recipe = with_defaults(
        make_recipe(
            {
                "model": "m",
                "data": {"train": "t.jsonl", **data},
                "training": {"per_device_train_batch_size": 4},
            }
        )
    )
    with (
        pytest.raises(EsftError) as caught,
        explain_out_of_memory(recipe, torch.device("cpu"), lambda: "in step 7"),
    ):
        raise error
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_more_what_is_said(error: Exception) -> None:
    before = peak_memory(torch.device("cpu"))
    said = explained(error, max_length=2048)
    assert said.startswith("cpu ran out of memory in step 7: ")
    assert float(said.split()[8]) >= int(before / 1e7) / 100
    for words in (
        "in batches of 4 blocks of up to 2,048 tokens",
        "training.per_device_train_batch_size (and raise training.gradient_accumulation_steps",
        "data.max_length",
        "selection.p",
        "training.gradient_checkpointing: true",
    ):
        assert words in said


def test_more_other_errors_stay_what_they_are() -> None:
    recipe = make_recipe({"model": "m", "data": {"train": "t.jsonl"}})
    with (
        pytest.raises(RuntimeError, match="shapes differ"),
        explain_out_of_memory(recipe, torch.device("cpu"), lambda: ""),
    ):
        raise RuntimeError("shapes differ")

"""How much memory is free, and when weights are streamed because of it."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from esft.streaming.available import available_memory, groups_left, too_large
from tests.models import tiny
from tests.streaming.streams import CPU, Watching


def group(folder: Path, limit: str, used: int, files: dict[str, int], version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    text = "".join(f"{name} {value}\n" for name, value in files.items())
    (folder / "memory.stat").write_text(text)


def test_every_group_around_a_process_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_7\n")
    root = tmp_path / "fs"
    group(root / "slurm" / "job_7", "1000", 300, {"anon": 100, "inactive_file": 150})
    group(root / "slurm", "max", 5000, {"inactive_file": 0})
    group(root, "1200", 1100, {"inactive_file": 0})
    assert groups_left(membership, root) == [850, 100]
    group(root, "1000", 1100, {"inactive_file": 0})
    assert groups_left(membership, root) == [850, 0]


def test_the_first_version_of_groups_has_other_names(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:devices:/x\n4:cpu,memory:/docker/1\n0::/\n")
    stat = {"inactive_file": 1, "total_inactive_file": 70}
    group(tmp_path / "fs" / "memory" / "docker" / "1", "1000", 300, stat, version=1)
    assert groups_left(membership, tmp_path / "fs") == [770]


def test_without_groups_the_machine_decides(tmp_path: Path) -> None:
    assert groups_left(tmp_path / "missing") == []
    free = available_memory(CPU)
    assert 0 < free <= psutil.virtual_memory().total


def huge(**overrides: object) -> PreTrainedModel:
    """A model on the meta device with about 400 GB of weights in float32."""
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=256, num_experts=128, **overrides)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def test_weights_that_do_not_fit_are_streamed_and_that_is_told() -> None:
    watching = Watching()
    assert too_large(huge(), torch.float32, CPU, watching)
    (note,) = watching.notes
    assert re.fullmatch(
        r"streaming: the weights take [\d.]+ GB as float32 and [\d.]+ [MG]B are free, so one layer "
        r"after another is read from disk; --no-stream loads them all",
        note,
    )


def test_weights_that_fit_are_not() -> None:
    watching = Watching()
    assert not too_large(tiny("qwen3_moe"), "auto", CPU, watching)
    assert watching.notes == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_computation_decides(dtype: torch.dtype) -> None:
    """A model that takes 0.6 of what may be used in bfloat16, and so 1.2 of it in float32."""
    with torch.device("meta"):
        model = torch.nn.Linear(1000, int(0.8 * 0.6 * available_memory(CPU) / 2 / 1000))
    assert too_large(model, dtype, CPU, Watching()) == (dtype is torch.float32)  # type: ignore[arg-type]

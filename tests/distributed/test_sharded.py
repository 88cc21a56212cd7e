"""FSDP2 in two processes: the curve, the delta and the checkpoints of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import esft
from tests.checkpoints import save_tiny
from tests.distributed.launcher import Launch, run_scenarios, told
from tests.distributed.sharded_scenarios import SHARDED
from tests.distributed.splits import curve, split
from tests.resumed_runs import cut_back, write_rows

SCENARIOS = "tests.distributed.sharded_scenarios"
NEAR = 1e-5
# As `accelerate launch --use_fsdp --fsdp_version 2 ...` tells its processes.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("sharded")
    save_tiny(folder / "tiny", "qwen3_moe")
    write_rows(folder / "train.jsonl")
    launch = run_scenarios(SCENARIOS, folder, limit=300, environment=FSDP)
    assert [end.code for end in launch.ended] == [0, 0], told(launch.ended)
    return launch


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_processes_have_the_run_of_one(launch: Launch, tmp_path: Path, name: str) -> None:
    options = SHARDED[name] | {"batch": 4, "accumulated": 1}
    alone = esft.train(split(launch.folder, options), tmp_path / "run")
    expected = alone.to_dict()
    # Rounded to bf16 in each layer, sums in another order differ more.
    near = 2e-2 if name == "bfloat16" else NEAR
    assert curve(launch.folder / "curves" / name) == pytest.approx(
        curve(tmp_path / "run"), abs=near
    )
    for result in (each[name] for each in launch.results("curves")):
        assert result["sharded"], "a process keeps parts"
        assert result["kept"] == pytest.approx(0.5, abs=0.1)
        assert result["train_loss"] == pytest.approx(expected["train_loss"], abs=near)
        for key in ("trained", "total", "routed"):
            assert result[key] == expected[key]
        if expected["moved"] is not None:
            assert result["moved"]["total"] == expected["moved"]["total"]
            assert result["moved"]["share"] == pytest.approx(expected["moved"]["share"], abs=0.01)
        for key in ("before", "after") if name == "plain" else ():
            assert result["drift"][key] == pytest.approx(expected["drift"][key], abs=NEAR)
        if name == "plain":
            assert result["evaluation"]["loss"] == pytest.approx(
                expected["evaluation"]["loss"], abs=1e-4
            )


@pytest.mark.parametrize("name", SHARDED)
def test_the_delta_is_whole(launch: Launch, tmp_path: Path, name: str) -> None:
    options = SHARDED[name] | {"batch": 4, "accumulated": 1}
    esft.train(split(launch.folder, options), tmp_path / "run")
    ours, theirs = (
        {
            name: tensor
            for file in sorted((run / "delta").glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for run in (launch.folder / "curves" / name, tmp_path / "run")
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.shape == theirs[key].shape
        # AdamW takes a step of the learning rate even where the gradient's sign is uncertain.
        close = torch.isclose(tensor.float(), theirs[key].float(), atol=1e-3)
        assert close.float().mean() > (0.9 if name == "bfloat16" else 0.99), key


def test_resumed_by_as_many_it_comes_to_the_same_bits(launch: Launch) -> None:
    assert launch.results("resumes_to_the_same_bits") == 2 * [{"same": True, "logged": True}]


def test_one_process_goes_on_with_what_sharded_ones_saved(launch: Launch, tmp_path: Path) -> None:
    shutil.copytree(launch.folder / "saves_for_one_process" / "run", tmp_path / "run")
    expected = curve(tmp_path / "run")
    cut_back(tmp_path / "run", 6)
    wanted = split(launch.folder, {"batch": 4, "save_strategy": "steps"})
    esft.train(wanted, tmp_path / "run", resume=True)
    assert curve(tmp_path / "run") == pytest.approx(expected, abs=NEAR)


def test_what_does_not_go_with_it_is_refused_with_the_reason(launch: Launch) -> None:
    for found in launch.results("refusals"):
        assert "its state is not sharded as parameters are" in found["adafactor"]
        assert "every process would keep all of them" in found["quantised"]


def test_alone_it_is_refused(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = split(launch.folder, {"batch": 4, "fsdp": True})
    with pytest.raises(esft.errors.RecipeError, match="there is one; launch several"):
        esft.train(json.loads(json.dumps(wanted)), tmp_path / "run")

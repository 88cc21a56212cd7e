"""Options of the training loop, each against what it is said to do; and what is logged."""

from __future__ import annotations

import io
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.progress import ConsoleReporter
from tests.checkpoints import save_tiny

CHOSEN = {0: [1, 6], 2: [4]}
ROWS = [(f"{n}:", "abcdefgh"[: 1 + n * 5 % 8]) for n in range(5)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loop")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experts = {str(layer): ids for layer, ids in CHOSEN.items()}
    (folder / "selection.json").write_text(json.dumps({"experts": experts}))
    return {
        "model": save_tiny(folder / "base"),
        "selection": folder / "selection.json",
        "data": {"train": folder / "rows.jsonl", "max_length": 32, "packing": False},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
        },
        "routing_drift": False,
    }


def train(setting: dict[str, Any], out: Path, **training: Any) -> Any:
    """Train with other fields of the training section; lower-case keys of the recipe go too."""
    outer = {key: training.pop(key) for key in ("method", "dtype") if key in training}
    wanted = setting | {"training": setting["training"] | training} | outer
    if outer.get("method") in ("lora", "full"):
        del wanted["selection"]
    return esft.train(wanted, out)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def delta(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "delta").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_smoothed_labels_are_divided_by_all_supervised_tokens(
    setting: dict[str, Any], tmp_path: Path, accumulated: int
) -> None:
    # A step sees four of five rows, then the one that is left: a window of fewer batches.
    epsilon, lr = 0.2, 0.1
    options = {
        "label_smoothing_factor": epsilon,
        "optim": "sgd",
        "max_grad_norm": 0,
        "learning_rate": lr,
        "max_steps": 2,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4 // accumulated,
        "gradient_accumulation_steps": accumulated,
    }
    run = train(setting, tmp_path / "run", **options)
    base = setting["model"]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    parameters = dict(model.named_parameters())
    for window in (ROWS[:4], ROWS[4:]):
        model.zero_grad()
        losses = []
        for prompt, answer in window:
            ids = torch.tensor([*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id])
            learnt = slice(-len(answer) - 1, None)
            chances = model(ids[None]).logits[0, :-1][learnt].log_softmax(-1)
            hit = -chances.gather(1, ids[1:][learnt][:, None])[:, 0]
            losses.append((1 - epsilon) * hit - epsilon * chances.mean(-1))
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for layer, experts in CHOSEN.items():
                for stack in ("gate_up_proj", "down_proj"):
                    weight = parameters[f"model.layers.{layer}.mlp.experts.{stack}"]
                    weight[experts] -= lr * weight.grad[experts]
    found = delta(run.out)
    for layer, experts in CHOSEN.items():
        for expert in experts:
            name = f"model.layers.{layer}.mlp.experts"
            expected = parameters[f"{name}.down_proj"][expert]
            assert torch.allclose(
                found[f"{name}.{expert}.down_proj.weight"].double(), expected, atol=1e-6
            )


@pytest.mark.parametrize("method", ["lora", "hot-lora", "full"])
def test_gradient_checkpointing_changes_no_bit(
    setting: dict[str, Any], tmp_path: Path, method: str
) -> None:
    plain = train(setting, tmp_path / "plain", method=method)
    # By its new name, which transformers 5.17 does not know.
    again = train(setting, tmp_path / "again", method=method, activation_checkpointing=True)
    assert plain.train_loss == again.train_loss
    expected, found = delta(plain.out), delta(again.out)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_other_processes_may_load_batches(setting: dict[str, Any], tmp_path: Path) -> None:
    plain = train(setting, tmp_path / "plain")
    again = train(setting, tmp_path / "again", dataloader_num_workers=1)
    expected, found = delta(plain.out), delta(again.out)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("how", [{"bf16": True}, {"dtype": "bfloat16"}])
def test_bf16_computes_and_fp32_trains(
    setting: dict[str, Any], tmp_path: Path, how: dict[str, Any]
) -> None:
    steps = {"save_strategy": "steps", "save_steps": 4}
    plain = train(setting, tmp_path / "plain", **steps)
    run = train(setting, tmp_path / "run", **how, **steps)
    losses = [[line["loss"] for line in log(r.out) if "loss" in line] for r in (plain, run)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    (state,) = (run.out / "checkpoints" / "step-000004").glob("*.safetensors")
    banks = {n: t for n, t in load_file(state).items() if n.startswith("parameter/")}
    assert banks
    for bank in banks.values():
        assert bank.dtype == torch.float32
        assert not torch.equal(bank, bank.bfloat16().float())


def test_what_is_logged(
    setting: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()  # a second passes whenever the clock is read
    monkeypatch.setattr("esft.run.clock.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    shown = io.StringIO()
    reporter = ConsoleReporter(Console(file=shown, force_terminal=True, width=200))
    steps = {"save_strategy": "steps", "save_steps": 3}
    wanted = setting | {"training": setting["training"] | steps}
    esft.train(wanted, tmp_path / "run", reporter=reporter)
    for text in ("training", "4/4", "loss", "tokens/s", "peak GB"):
        assert text in shown.getvalue()
    lines = log(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(setting["model"])
    # Each row once in three steps, and two rows more; padding does not count.
    epoch = sum(len(tokenizer(prompt + answer).input_ids) + 1 for prompt, answer in ROWS)
    assert lines[2]["tokens"] == epoch < lines[3]["tokens"] < 2 * epoch
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(set(seconds))
    assert all(line["peak_memory"] > 1e8 for line in lines)
    # A resumed run goes on counting.
    for end in ("delta", "checkpoints/step-000004"):
        (tmp_path / "run" / end).rename(tmp_path / Path(end).name)
    esft.train(wanted, tmp_path / "run", resume=True)
    again = log(tmp_path / "run")
    assert [line["tokens"] for line in again] == [line["tokens"] for line in lines]
    assert again[2]["seconds"] == seconds[2]
    assert again[3]["seconds"] > seconds[2]

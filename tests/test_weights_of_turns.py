"""Training with weights of turns: gradient descent on the weighed mean of a whole step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.errors import RecipeError
from tests.chat_families import CHATML
from tests.checkpoints import save_tiny

CHOSEN = {0: [1, 6], 2: [4]}
# What each row's two answers weigh; None where the row does not say.
WEIGHTS: list[tuple[float | None, float | None]] = [
    (None, None),
    (0, 1),
    (0.25, None),
    (3, 0.5),
    (1, 0),
    (None, 2),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("base") / "tiny")
    CHATML.tokenizer(tags=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = []
    for number, weights in enumerate(WEIGHTS):
        turns: list[dict[str, Any]] = []
        for turn, weight in enumerate(weights):
            answer = {"role": "assistant", "content": "abcdef"[: 1 + (number + 3 * turn) % 6]}
            turns += [
                {"role": "user", "content": f"{number}?"},
                answer if weight is None else answer | {"weight": weight},
            ]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines))
    return path


def rows_by_hand(data: Path, tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each row's tokens and what they weigh, from its text piece by piece."""
    rows = []
    for line in data.read_text().splitlines():
        ids: list[int] = []
        weights: list[float] = []
        for message in json.loads(line)["messages"]:
            answers = message["role"] == "assistant"
            head = f"<|im_start|>{message['role']}\n"
            body = f"{message['content']}<|im_end|>"
            for text, weight in (
                (head, 0.0),
                (body, message.get("weight", 1.0) if answers else 0.0),
                ("\n", 0.0),
            ):
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += tokens
                weights += [weight] * len(tokens)
        rows.append((torch.tensor(ids), torch.tensor(weights, dtype=torch.float64)))
    return rows


def trained_by_hand(
    base: Path, data: Path, *, steps: int, lr: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Gradient descent over all rows at once, row by row, in float64, by autograd alone."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    rows = rows_by_hand(data, AutoTokenizer.from_pretrained(base))
    stacks = {
        f"model.layers.{layer}.mlp.experts.{stack}": experts
        for layer, experts in CHOSEN.items()
        for stack in ("gate_up_proj", "down_proj")
    }
    parameters = dict(model.named_parameters())
    seen = []
    for _ in range(steps):
        model.zero_grad()
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for ids, weights in rows:
            losses = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total = total + (weights[1:] * losses).sum()
            weight += float(weights[1:].sum())
        loss = total / weight
        loss.backward()
        seen.append(loss.item())
        with torch.no_grad():
            for name, experts in stacks.items():
                parameters[name][experts] -= lr * parameters[name].grad[experts]
    return seen, {name: parameters[name].detach() for name in stacks}


def recipe(base: Path, data: Path, folder: Path, packing: bool, **training: Any) -> dict[str, Any]:
    selection = folder / "selection.json"
    selection.write_text(json.dumps({str(k): v for k, v in CHOSEN.items()}))
    return {
        "model": str(base),
        "data": {"train": str(data), "max_length": 80, "packing": packing},
        "selection": str(selection),
        "training": {
            "optim": "sgd",
            "max_grad_norm": 0,
            "learning_rate": 0.1,
            "max_steps": 3,
            "logging_steps": 1,
            **training,
        },
    }


@pytest.mark.parametrize(
    ("batch", "accumulated", "packing"), [(6, 1, False), (2, 3, False), (1, 6, True)]
)
def test_a_step_is_gradient_descent_on_the_weighed_mean(
    base: Path, data: Path, tmp_path: Path, batch: int, accumulated: int, packing: bool
) -> None:
    # Each step sees all rows, however they are cut into batches of unlike weight.
    wanted = recipe(
        base,
        data,
        tmp_path,
        packing,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
    )
    esft.train(wanted, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 3
    losses, expected = trained_by_hand(base, data, steps=3, lr=0.1)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, abs=1e-5)
    esft.merge(base, tmp_path / "run" / "delta", tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in expected.items():
        moved = (tensor - before[name]).norm()
        assert moved > 5e-3
        assert (found[name] - tensor).norm() < 1e-5 * moved + 1e-6, name


def test_weights_and_smoothed_labels_contradict_each_other(
    base: Path, data: Path, tmp_path: Path
) -> None:
    wanted = recipe(base, data, tmp_path, False, label_smoothing_factor=0.1)
    with pytest.raises(RecipeError, match=r"^training.label_smoothing_factor: .*have weights"):
        esft.train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()

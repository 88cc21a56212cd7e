"""TRL's trainers on a model with a selection attached: the steps that they say, and the delta."""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import esft
from esft.errors import ModelError, RecipeError
from esft.experts import attach
from esft.locating import TINY_MOE_FOLDER
from esft.moe import trainable_parameters
from esft.selection import Selection
from tests.models import tiny

# Its rows have 4 to 11 labelled tokens; the experts are among those that they go through most.
TASK = "snake"
PICKED = {1: [32, 26, 61], 2: [39], 4: [5, 27]}
RATE, BETA = 0.1, 0.1
ROWS, PAIRS, STEPS = 4, 2, 2
OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
}


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Every `train` collects garbage; what the libraries made of themselves is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_MOE_FOLDER)


def task(rows: int) -> list[dict[str, str]]:
    lines = (TINY_MOE_FOLDER / "tasks" / TASK / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:rows]]


def plain(dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_MOE_FOLDER, dtype=dtype, **options)


def attached() -> PreTrainedModel:
    return attach(plain(), Selection(PICKED))


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_saved(folder: Path, delta: Path, merged: Path) -> None:
    """What `save_model` wrote and the merge are one ordinary checkpoint, to the last bit."""
    esft.merge("tiny-moe", delta, merged)
    esft.verify("tiny-moe", delta, merged)
    # The trainer's model is in float32, the base in bfloat16.
    saved, found = weights(folder), weights(merged)
    assert saved.keys() == found.keys()
    for name, tensor in found.items():
        assert torch.equal(saved[name].to(tensor.dtype), tensor), name


def descent(loss: Any) -> dict[str, Tensor]:
    """Gradient descent on the selected experts' rows, by autograd in float64: the oracle.

    Args:
        loss: takes the model and returns what is minimised, computed row by row.
    """
    model = plain(torch.float64, experts_implementation="eager")
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    picked = {
        f"model.layers.{layer}.mlp.experts.{stack}": experts
        for layer, experts in PICKED.items()
        for stack in ("gate_up_proj", "down_proj")
    }
    for name in picked:
        parameters[name].requires_grad_(True)
    for _ in range(STEPS):
        model.zero_grad()
        loss(model).backward()
        with torch.no_grad():
            for name, experts in picked.items():
                parameters[name][experts] -= RATE * parameters[name].grad[experts]
    return {name: parameters[name].detach()[experts] for name, experts in picked.items()}


def assert_descended(
    model: PreTrainedModel, before: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    after = trained(model)
    assert len(after) == len(expected)
    for name, value in expected.items():
        key = name.replace(".experts.", ".experts.esft.trainable.")
        moved = (value - before[key]).norm()
        assert moved > 1e-5, name
        assert (after[key] - value).norm() < 1e-3 * moved, name


def sum_of_losses(model: Any, ids: list[int], labelled: list[bool]) -> Tensor:
    tokens = torch.tensor(ids)
    losses = cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="none")
    return losses[torch.tensor(labelled)[1:]].sum()


def mean_loss(rows: list[tuple[list[int], list[bool]]]) -> Any:
    counted = sum(sum(labelled[1:]) for _, labelled in rows)
    return lambda model: sum(sum_of_losses(model, *row) for row in rows) / counted


def prompts(rows: list[dict[str, str]]) -> list[tuple[list[int], list[bool]]]:
    """Tokens of prompts and completions, and which of them are labelled."""
    found = []
    for row in rows:
        prompt = tokenizer()(row["prompt"])["input_ids"]
        ids = tokenizer()(row["prompt"] + row["completion"])["input_ids"]
        assert ids[: len(prompt)] == prompt
        ids = [*ids, tokenizer().eos_token_id]
        found.append((ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))))
    return found


def chats(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Conversations of two answers each."""
    return [
        [
            {"role": role, "content": row[key]}
            for row in rows[at : at + 2]
            for role, key in (("user", "prompt"), ("assistant", "completion"))
        ]
        for at in range(0, len(rows), 2)
    ]


def turns(chats: list[list[dict[str, str]]]) -> list[tuple[list[int], list[bool]]]:
    """Tokens of conversations as tiny-moe writes them, and which of them are labelled."""
    found = []
    for chat in chats:
        ids, labelled = [tokenizer().bos_token_id], [False]
        for turn in chat:
            head = tokenizer().convert_tokens_to_ids(f"<|{turn['role']}|>")
            text = tokenizer()(turn["content"], add_special_tokens=False)["input_ids"]
            answer = turn["role"] == "assistant"
            text = [*text, tokenizer().eos_token_id] if answer else text
            ids += [head, *text]
            labelled += [False] + [answer] * len(text)
        found.append((ids, labelled))
    return found


@cache
def sft_oracle(kind: str) -> dict[str, Tensor]:
    rows = task(ROWS)
    return descent(mean_loss(prompts(rows) if kind == "prompts" else turns(chats(rows))))


@pytest.mark.parametrize(
    "kind", ["padded", "packed", "accumulated", "assistant_only_loss", "recomputed"]
)
def test_sft_is_gradient_descent_on_the_labelled_tokens(kind: str, tmp_path: Path) -> None:
    """Plain gradient descent: with AdamW a wrong scale of the loss would not show."""
    changes: dict[str, Any] = {
        "padded": {},
        "packed": {"packing": True, "max_length": 128},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ROWS // 2},
        "recomputed": {"gradient_checkpointing": True},
        "assistant_only_loss": {"assistant_only_loss": True},
    }[kind]
    rows: list[dict[str, Any]] = task(ROWS)
    if kind == "assistant_only_loss":
        rows = [{"messages": chat} for chat in chats(rows)]
    model = attached()
    before = trained(model)
    work = SFTTrainer(
        model,
        SFTConfig(str(tmp_path / "out"), **OPTIONS | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[esft.SaveDelta(tmp_path / "delta")],
    )
    work.train()
    expected = sft_oracle("turns" if kind == "assistant_only_loss" else "prompts")
    assert_descended(model, before, expected)
    work.save_model(tmp_path / "saved")
    assert_saved(tmp_path / "saved", tmp_path / "delta", tmp_path / "merged")


def pairs() -> list[dict[str, str]]:
    """Each row's answer is chosen, the next one's rejected."""
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in pairwise(task(PAIRS + 1))
    ]


def answers_logps(model: Any, kind: str) -> Tensor:
    """Log-probability of each row's chosen or rejected answer."""
    asked = [{"prompt": row["prompt"], "completion": row[kind]} for row in pairs()]
    return torch.stack([-sum_of_losses(model, *row) for row in prompts(asked)])


@cache
def dpo_oracle() -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The base's log-probabilities of chosen and rejected answers; the experts after descent."""
    with torch.no_grad():
        base = plain(torch.float64, experts_implementation="eager")
        chosen, rejected = (answers_logps(base, kind) for kind in ("chosen", "rejected"))

    def loss(policy: Any) -> Tensor:
        moved = (
            answers_logps(policy, "chosen") - chosen,
            answers_logps(policy, "rejected") - rejected,
        )
        return -logsigmoid(BETA * (moved[0] - moved[1])).mean()

    return (chosen, rejected), descent(loss)


def dpo(model: PreTrainedModel, out: Path, **changes: Any) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=DPOConfig(str(out / "out"), beta=BETA, **OPTIONS | changes),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=tokenizer(),
        callbacks=[esft.SaveDelta(out / "delta")],
    )


@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_s_reference_is_the_base(precomputed: bool, tmp_path: Path) -> None:
    model = attached()
    before = trained(model)
    work = dpo(model, tmp_path, precompute_ref_log_probs=precomputed)
    work.train()
    reference, expected = dpo_oracle()
    if precomputed:
        assert work.ref_model is None
        columns = [work.train_dataset[f"ref_{kind}_logps"] for kind in ("chosen", "rejected")]
        found = [torch.tensor(column[:]) for column in columns]
    else:
        # After training: it shares no weight with the model that trains.
        base, tensors = plain().state_dict(), work.ref_model.state_dict()
        assert base.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.items())
        batch = work.data_collator([work.train_dataset[n] for n in range(PAIRS)])
        found = work.compute_ref_log_probs(work.ref_model, batch)
    for logps, value in zip(found, reference, strict=True):
        assert torch.allclose(logps.double(), value, atol=1e-4)
    first = work.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert_descended(model, before, expected)
    work.save_model(tmp_path / "saved")
    assert_saved(tmp_path / "saved", tmp_path / "delta", tmp_path / "merged")


def test_grpo_s_reference_is_the_base(tmp_path: Path) -> None:
    model = attached()
    before = trained(model)
    work = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(text) % 5) for text in completions],
        args=GRPOConfig(
            str(tmp_path / "out"),
            **OPTIONS | {"max_steps": 2, "beta": 0.1},
            num_generations=ROWS,
            max_completion_length=8,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in task(ROWS)]),
        processing_class=tokenizer(),
        callbacks=[esft.SaveDelta(tmp_path / "delta")],
    )
    work.train()
    first, second = work.state.log_history[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-6  # what trained went away from what did not
    assert any(not torch.equal(before[name], value) for name, value in trained(model).items())
    work.save_model(tmp_path / "saved")
    assert_saved(tmp_path / "saved", tmp_path / "delta", tmp_path / "merged")


def test_a_balance_loss_on_a_frozen_router_is_warned_of(tmp_path: Path) -> None:
    """TRL takes the coefficient from the model unless told, and adds the loss."""
    model = attach(tiny("qwen3_moe", vocab_size=1024), Selection({0: [1]}))
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    for factor, warned in ((None, True), (0.0, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work = SFTTrainer(
                model,
                SFTConfig(str(tmp_path), **OPTIONS, router_aux_loss_coef=factor),
                train_dataset=Dataset.from_list(task(2)),
                processing_class=tokenizer(),
                callbacks=[esft.SaveDelta(tmp_path / "delta")],
            )
        assert work.aux_loss_enabled == warned
        found = [str(w.message) for w in caught if "router_aux_loss_coef is" in str(w.message)]
        assert len(found) == warned


def test_a_reference_that_follows_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="sync_ref_model: TRL pairs the parameters"):
        dpo(attached(), tmp_path, sync_ref_model=True)


def test_peft_s_configuration_beside_a_selection_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    with pytest.raises(ModelError, match=r"PEFT wraps this model .* leave out peft_config"):
        SFTTrainer(
            attached(),
            SFTConfig(str(tmp_path), **OPTIONS),
            train_dataset=Dataset.from_list(task(4)),
            processing_class=tokenizer(),
            peft_config=LoraConfig(target_modules=["q_proj"]),
            callbacks=[esft.SaveDelta(tmp_path / "delta")],
        )

"""N1 to N3: numbers that are none, gradients added up over batches, updates too small for bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import esft
from esft.errors import EsftError
from esft.run.checkpoint import last
from esft.run.trainer import EsftTrainer
from tests.checkpoints import save_tiny

CHOSEN = {0: [1, 6], 2: [4]}
STACKS = {
    f"model.layers.{layer}.mlp.experts.{stack}": experts
    for layer, experts in CHOSEN.items()
    for stack in ("gate_up_proj", "down_proj")
}


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(
    base: Path,
    data: Path,
    folder: Path,
    chosen: dict[int, list[int]] = CHOSEN,
    **training: Any,
) -> dict[str, Any]:
    """Return a run over unpacked rows in their order; `training` may have others' keys."""
    selection = folder / "selection.json"
    selection.write_text(json.dumps({"experts": {str(k): v for k, v in chosen.items()}}))
    outer = {key: training.pop(key) for key in ("dtype", "param_dtype") if key in training}
    packing, max_length = training.pop("packing", False), training.pop("max_length", 32)
    return {
        "model": base,
        "selection": selection,
        "data": {"train": data, "packing": packing, "max_length": max_length},
        "training": {
            "per_device_train_batch_size": 1,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            **training,
        },
        "routing_drift": False,
        **outer,
    }


# N1

POISONED = "Z"  # only one row has this character


def poison_embedding(model: PreTrainedModel, token: int, _answer: int) -> None:
    """NaN where the character is read."""
    model.get_input_embeddings().weight[token] = torch.nan


def poison_output(model: PreTrainedModel, token: int, answer: int) -> None:
    """An answer whose logit is minus infinity after the character, and far below all elsewhere.

    Two hidden dimensions are kept for this, one for the character and one that all tokens share:
    no layer writes into them.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "experts.down_proj")):
            weight.narrow(-2, 0, 2).zero_()
    embedding = model.get_input_embeddings().weight
    embedding[:, 0], embedding[:, 1] = 0, 1
    embedding[token, 0] = 100
    model.lm_head.weight[:, :2] = 0
    model.lm_head.weight[answer, 0], model.lm_head.weight[answer, 1] = -3e38, -1e6


def poison_norm(model: PreTrainedModel, token: int, _answer: int) -> None:
    """A character whose hidden states are 0 in every layer: they are normalised to 0, the loss is
    finite, and its gradient is multiplied by 1e19 in each norm that it comes through."""
    model.config.rms_norm_eps = 1e-38
    model.get_input_embeddings().weight[token] = 0


Poison = Callable[[PreTrainedModel, int, int], None]
LAST = {2: [1, 4]}  # no later layer reads what these write
POISONS: dict[str, tuple[Poison, dict[int, list[int]], str, str]] = {
    "loss nan": (poison_embedding, CHOSEN, "loss", "nan"),
    "loss inf": (poison_output, LAST, "loss", "inf"),
    "gradient": (poison_norm, CHOSEN, "gradient", "nan"),
}


@pytest.fixture(scope="module", params=list(POISONS))
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base on which one row spoils its step, rows, and what is not finite in it."""
    poison, chosen, quantity, value = POISONS[request.param]
    folder = tmp_path_factory.mktemp("poisoned")
    base = save_tiny(folder / "base", adds_bos=False)  # a row may begin with the character
    token, answer = AutoTokenizer.from_pretrained(base)(POISONED + "z").input_ids[-2:]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        poison(model, token, answer)
    model.save_pretrained(base)
    rows = [(f"{n}:", "abcdefgh"[: 2 + n % 4]) for n in range(8)]
    rows[5] = (POISONED, "z")
    return base, write_rows(folder / "rows.jsonl", rows), chosen, quantity, value


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_n1_stops_before_the_step(
    poisoned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    # A fused optimizer skips the step by itself, and the outcome is read later.
    base, data, chosen, quantity, value = poisoned
    weights: dict[str, Tensor] = {}
    run = EsftTrainer.run

    def watched(self: EsftTrainer, *args: Any) -> Any:
        try:
            return run(self, *args)
        finally:
            weights.update((name, p.detach().clone()) for name, p in trained(self.model))

    monkeypatch.setattr(EsftTrainer, "run", watched)
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "optim": optim}
    wanted = recipe(base, data, tmp_path, chosen, save_strategy="steps", save_steps=1, **options)
    out = tmp_path / "run"
    for resume in (False, True):  # the last good checkpoint can be resumed from: to the same end
        with pytest.raises(EsftError) as caught:
            esft.train(wanted, out, resume=resume)
        message = str(caught.value)
        assert message.startswith(f"step 3: the {quantity} is {value}, with the rows ")
        assert f"{data}:6" in message
        report = json.loads((out / "diverged.json").read_text())
        assert (report["step"], report["quantity"], report["value"]) == (3, quantity, value)
        rows = [[f"{data}:5"], [f"{data}:6"]]
        assert [batch["rows"] for batch in report["batches"]] == rows
        finite = [batch["loss"] not in ("nan", "inf") for batch in report["batches"]]
        assert finite == [True, quantity == "gradient"]
        saved = last(out / "checkpoints")
        assert saved is not None
        assert saved.step == 2
        kept = saved.read("parameter")
        assert kept.keys() == weights.keys()
        assert all(torch.equal(kept[name], weights[name]) for name in kept)
        assert [line["step"] for line in log(out)] == [1, 2]
        assert not (out / "delta").exists()
        (out / "diverged.json").unlink()


def trained(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# N2

# All of one length, with 2 to 9 supervised tokens.
ROWS = [
    (f"{n:02d}" + "." * (8 - answer), "abcdefgh"[:answer])
    for n in range(22)
    for answer in [1 + n * 5 % 8]
]
LENGTH = 12  # with BOS and EOS


def by_hand(base: Path, windows: list[list[int]], lr: float) -> dict[str, Tensor]:
    """Gradient descent in float64, row by row, by autograd alone: one step a window of rows."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    parameters = dict(model.named_parameters())
    for window in windows:
        model.zero_grad()
        losses = []
        for row in window:
            prompt, answer = ROWS[row]
            ids = torch.tensor([*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id])
            learnt = slice(-len(answer) - 1, None)
            logits = model(ids[None]).logits[0, :-1]
            losses.append(cross_entropy(logits[learnt], ids[1:][learnt], reduction="none"))
        torch.cat(losses).mean().backward()
        with torch.no_grad():
            for name, experts in STACKS.items():
                parameters[name][experts] -= lr * parameters[name].grad[experts]
    return {name: parameters[name].detach()[experts] for name, experts in STACKS.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.mark.parametrize("packing", [False, True], ids=["separate", "packed"])
@pytest.mark.parametrize("accumulated", [1, 2, 4, 8])
def test_n2_accumulated_gradients_are_the_full_batch_s(
    base: Path, tmp_path: Path, accumulated: int, packing: bool
) -> None:
    # Two epochs over 11 batches of one item: each epoch ends with a step of fewer batches than the
    # others, but where a step has one batch.
    items = [[2 * n, 2 * n + 1] if packing else [n] for n in range(11)]
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[row] for item in items for row in item])
    wanted = recipe(
        base,
        data,
        tmp_path,
        packing=packing,
        max_length=2 * LENGTH if packing else LENGTH,
        gradient_accumulation_steps=accumulated,
        optim="sgd",
        max_grad_norm=0,
        learning_rate=0.05,
        num_train_epochs=2,
    )
    result = esft.train(wanted, tmp_path / "run")
    windows = [
        [row for item in items[start : start + accumulated] for row in item]
        for start in range(0, len(items), accumulated)
    ] * 2
    assert result.steps == len(windows)
    assert_trained(tmp_path / "run", base, by_hand(base, windows, lr=0.05), 1e-4)


def assert_trained(run: Path, base: Path, expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare a run's trained experts with others by how far both have moved."""
    before = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    merged = esft.merge(base, run / "delta", run / "merged")
    found = dict(AutoModelForCausalLM.from_pretrained(merged).named_parameters())
    for name, experts in STACKS.items():
        moved = expected[name] - before[name][experts]
        assert moved.norm() > 1e-3
        assert (found[name][experts] - expected[name]).norm() < tolerance * moved.norm(), name


# N3

FEW = ROWS[:6]


def adamw_by_hand(base: Path, dtype: torch.dtype, steps: int, lr: float) -> dict[str, Tensor]:
    """AdamW on fp32 copies of the experts, in plain torch; the model computes in `dtype`.

    All rows at once: one step an epoch.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = [
        [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id] for prompt, answer in FEW
    ]
    ids = torch.tensor(tokens)
    labels = torch.full_like(ids, -100)
    for row, (_, answer) in enumerate(FEW):
        labels[row, -len(answer) - 1 :] = ids[row, -len(answer) - 1 :]
    parameters = dict(model.named_parameters())
    masters = {
        name: parameters[name].detach()[experts].float().requires_grad_()
        for name, experts in STACKS.items()
    }
    optimizer = torch.optim.AdamW(masters.values(), lr=lr, weight_decay=0)
    for _ in range(steps):
        model.zero_grad()
        logits = model(ids).logits[:, :-1].float()
        cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        for name, master in masters.items():
            master.grad = parameters[name].grad[STACKS[name]].float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                parameters[name][STACKS[name]] = master.to(dtype)
    return {name: master.detach() for name, master in masters.items()}


@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [
        (torch.float32, "float32", 1e-3),
        (torch.bfloat16, "float32", 1e-3),
        # Gradients rounded to bf16 are summed in another order here and there.
        (torch.bfloat16, "bfloat16", 0.1),
    ],
    ids=["fp32 base", "bf16 base", "bf16 base and compute"],
)
def test_n3_updates_too_small_for_bf16_are_kept(
    base: Path, tmp_path: Path, stored: torch.dtype, dtype: str, tolerance: float
) -> None:
    rounded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(rounded)
    AutoTokenizer.from_pretrained(base).save_pretrained(rounded)
    data = write_rows(tmp_path / "rows.jsonl", FEW)
    wanted = recipe(
        rounded,
        data,
        tmp_path,
        dtype=dtype,
        learning_rate=1e-6,
        max_steps=50,
        per_device_train_batch_size=len(FEW),
        save_strategy="steps",
        save_steps=50,
    )
    result = esft.train(wanted, tmp_path / "run")
    expected = adamw_by_hand(rounded, getattr(torch, dtype), steps=50, lr=1e-6)
    before = dict(AutoModelForCausalLM.from_pretrained(rounded, dtype=stored).named_parameters())
    saved = last(tmp_path / "run" / "checkpoints")
    assert saved is not None
    banks = saved.read("parameter")
    delta = load_file(tmp_path / "run" / "delta" / "esft_delta.safetensors")
    changed = 0
    for name, experts in STACKS.items():
        start = before[name].detach()[experts]
        bank = banks[name.replace(".experts.", ".experts.esft.trainable.")]
        moved = (expected[name] - start).norm()
        assert moved > 0
        assert (bank - expected[name]).norm() < tolerance * moved, name
        # What is stored is the bank, rounded once.
        for number, expert in enumerate(experts):
            layer, _, stack = name.rpartition(".experts.")
            names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[stack]
            parts = [delta[f"{layer}.experts.{expert}.{part}.weight"] for part in names]
            assert torch.equal(torch.cat(parts), bank[number].to(stored))
        changed += int((bank.to(stored) != start).sum())
    assert result.stored_moved is not None
    assert result.stored_moved.changed == changed > 0
    # Most elements move in fp32, whatever the base's precision; of bf16 few numbers do.
    assert result.moved.share > 0.9
    assert (result.stored_moved.share < 0.2) == (stored == torch.bfloat16)

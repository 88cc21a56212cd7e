"""Losses of routers in a run: their gradients against a plain loop, what is logged and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.errors import RecipeError
from esft.moe import moe_layers
from esft.recipe import make_recipe, read_recipe
from esft.recipe_sections import LossSpec
from esft.routers.losses import device_groups, make_losses
from tests.models import EXPERTS, LAYERS, TOP_K, tiny
from tests.notes import Notes
from tests.router_runs import CHOSEN, RATE, first_loss, in_batches, wanted
from tests.test_training import metrics

DEVICES = [[0, 5, 7], [1, 2, 3, 4, 6]]
WEIGHTS = {
    "load_balance": 0.3,
    "expert_balance": 0.2,
    "device_balance": 0.5,
    "sequence_balance": 0.4,
    "importance": 0.1,
    "router_z": 0.05,
}
ALL: dict[str, Any] = {**WEIGHTS, "devices": DEVICES}


def losses_by_hand(routed: list[list[Tensor]]) -> dict[str, Tensor]:
    """Each loss of a batch from the logits of its rows, by layer, row by row."""
    found: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for rows in routed:
        p, z = torch.cat(rows).softmax(-1), torch.cat(rows)
        T = len(p)
        best = p.topk(TOP_K)
        gates = best.values / best.values.sum(-1, keepdim=True)
        f, P, given = [], [], []
        for i in range(EXPERTS):
            chosen = (best.indices == i).double()
            f.append(chosen.sum() / T)
            P.append(p[:, i].mean())
            given.append((gates * chosen).sum())
        even = sum(a * b for a, b in zip(f, P, strict=True))
        found["load_balance"].append(torch.as_tensor(EXPERTS * even))
        found["expert_balance"].append(torch.as_tensor(EXPERTS / TOP_K * even))
        device: Any = 0.0
        for group in DEVICES:
            share = EXPERTS / TOP_K * sum(f[i] for i in group) / len(group)
            device = device + share * sum(P[i] for i in group)
        found["device_balance"].append(device)
        importance = torch.stack(given)
        spread = ((importance - importance.mean()) ** 2).mean()
        found["importance"].append(spread / importance.mean() ** 2)
        found["router_z"].append((z.exp().sum(-1).log() ** 2).mean())
        each = []
        for row in rows:
            q = row.softmax(-1)
            counts = torch.stack(
                [(q.topk(TOP_K).indices == i).double().mean() for i in range(EXPERTS)]
            )
            each.append(EXPERTS * (counts * q.mean(0)).sum())
        found["sequence_balance"].append(torch.stack(each).mean())
    return {name: torch.stack(values).mean() for name, values in found.items()}


def by_hand(
    base: Path, data: Path, steps: int, packing: bool, size: int, accumulated: int
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Gradient descent in float64, row by row, and each step's losses."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float64, experts_implementation="eager"
    )
    examples = encode_rows(read_rows(data), AutoTokenizer.from_pretrained(base))
    made = in_batches(examples, packing, size)
    logged = []
    for step in range(steps):
        model.zero_grad()
        task, count = torch.zeros((), dtype=torch.float64), 0
        sums = dict.fromkeys(WEIGHTS, torch.zeros((), dtype=torch.float64))
        # Not a whole number of steps: each epoch ends with a step of fewer batches.
        per_epoch = -(-len(made) // accumulated)
        begin = step % per_epoch * accumulated
        now = made[begin : begin + accumulated]
        for batch in now:
            routed: list[list[Tensor]] = [[] for _ in range(LAYERS)]
            for example in batch:
                ids = torch.tensor(example.input_ids)
                out = model(ids[None], output_router_logits=True)
                for layer, logits in enumerate(out.router_logits):
                    routed[layer].append(logits)
                learnt = torch.tensor(example.completion)[1:]
                task = (
                    task
                    + cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")[learnt].sum()
                )
                count += int(learnt.sum())
            sums = {name: sums[name] + value for name, value in losses_by_hand(routed).items()}
        means = {name: total / len(now) for name, total in sums.items()}
        total = task / count + sum(WEIGHTS[name] * value for name, value in means.items())
        total.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        logged.append({"loss": (task / count).item()} | {k: v.item() for k, v in means.items()})
    return dict(model.state_dict()), logged


@pytest.mark.parametrize(
    ("method", "steps", "packing", "size", "accumulated", "checkpointing"),
    [
        ("full", 2, False, 3, 2, False),
        # One step: in the loop all weights move, not only those that train here.
        ("esft", 1, True, 1, 3, True),
    ],
)
def test_a_step_is_gradient_descent_on_all_losses(
    base: Path,
    data: Path,
    tmp_path: Path,
    method: str,
    steps: int,
    packing: bool,
    size: int,
    accumulated: int,
    checkpointing: bool,
) -> None:
    """Padding does not count, rows of a block do, accumulated batches are averaged."""
    (tmp_path / "selection.json").write_text(json.dumps({str(k): v for k, v in CHOSEN.items()}))
    made = wanted(
        base,
        data,
        ALL,
        method=method,
        packing=packing,
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        gradient_checkpointing=checkpointing,
    )
    if method == "esft":
        made |= {"selection": tmp_path / "selection.json", "train": {"router": True}}
    esft.train(made, tmp_path / "run")
    expected, logged = by_hand(base, data, steps, packing, size, accumulated)
    lines = metrics(tmp_path / "run")[:steps]
    for line, values in zip(lines, logged, strict=True):
        for name, value in values.items():
            assert line[name] == pytest.approx(value, rel=2e-5), name
    esft.merge(base, tmp_path / "run" / "delta", tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, tensor in expected.items():
        picked: Any = slice(None)
        if method == "esft":
            layer = int(name.split(".")[2]) if ".layers." in name else -1
            trained = name.endswith("mlp.gate.weight")
            if ".mlp.experts." in name and layer in CHOSEN:
                trained, picked = True, CHOSEN[layer]
            if not trained:
                assert torch.equal(found[name], before[name]), name
                continue
        moved = (tensor[picked] - before[name][picked]).norm()
        assert moved > 1e-4, name
        assert (found[name][picked] - tensor[picked]).norm() < 2e-4 * moved + 1e-6, name


def test_the_loss_that_is_logged_is_the_task_s(base: Path, data: Path, tmp_path: Path) -> None:
    for name, losses in (("without", None), ("with", ALL)):
        made = wanted(base, data, losses, method="lora", train=None, max_steps=1)
        esft.train(made, tmp_path / name)
    assert first_loss(tmp_path / "with") == first_loss(tmp_path / "without")
    assert not WEIGHTS.keys() & metrics(tmp_path / "without")[0].keys()
    assert WEIGHTS.keys() <= metrics(tmp_path / "with")[0].keys()


def test_values_between_log_lines_are_averaged(base: Path, data: Path, tmp_path: Path) -> None:
    """Over the batches of two steps, two and one; the weights do not move."""
    for name, every in (("each", 1), ("both", 2)):
        made = wanted(base, data, ALL, method="full", learning_rate=1e-30, logging_steps=every)
        esft.train(made, tmp_path / name)
    each, both = metrics(tmp_path / "each"), metrics(tmp_path / "both")
    for name in WEIGHTS:
        assert both[0][name] == pytest.approx((2 * each[0][name] + each[1][name]) / 3, rel=1e-6)
        assert each[0][name] != each[1][name]


@contextmanager
def counting_hooks() -> Iterator[list[int]]:
    """Count the hooks on each router when it runs."""
    counts: list[int] = []

    def note(module: nn.Module, _args: Any) -> None:
        if type(module).__name__.endswith("Router"):
            counts.append(len(module._forward_hooks) + len(module._forward_pre_hooks))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield counts
    finally:
        handle.remove()


def test_without_losses_nothing_is_hooked(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps(CHOSEN))
    files = []
    for name, losses in (("none", None), ("zero", dict.fromkeys(WEIGHTS, 0.0)), ("on", ALL)):
        made = wanted(base, data, losses, selection=tmp_path / "s.json", max_steps=1)
        with counting_hooks() as counts:
            esft.train(made, tmp_path / name)
        assert (max(counts) > 0) == (name == "on")
        files.append((tmp_path / name / "delta" / "esft_delta.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_loss_on_frozen_routers_is_warned_of(base: Path, data: Path, tmp_path: Path) -> None:
    notes = Notes()
    model = tiny("qwen3_moe").requires_grad_(False)
    spec = LossSpec(load_balance=0.01, router_z=0.1)
    assert make_losses(spec, moe_layers(model), "qwen3_moe", notes) is not None
    (said,) = notes.notes
    assert "load_balance, router_z: the routers are frozen" in said
    assert "hidden states that earlier trained layers" in said
    assert "router: true" in said

    for layer in moe_layers(model):
        layer.router.requires_grad_(True)  # type: ignore[union-attr]
    notes = Notes()
    make_losses(spec, moe_layers(model), "qwen3_moe", notes)
    assert notes.notes == []
    assert make_losses(LossSpec(), moe_layers(model), "qwen3_moe", notes) is None
    assert make_losses(None, moe_layers(model), "qwen3_moe", notes) is None


def test_on_frozen_routers_it_acts_through_earlier_trained_layers(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Experts of the last layer have no router after them: they train as without the loss."""
    deltas = []
    (tmp_path / "s.json").write_text(json.dumps(CHOSEN))
    for name, losses in (("without", None), ("with", {"load_balance": 5.0})):
        made = wanted(base, data, losses, selection=tmp_path / "s.json", max_steps=1)
        esft.train(made, tmp_path / name)
        deltas.append(load_file(tmp_path / name / "delta" / "esft_delta.safetensors"))
    for name, tensor in deltas[0].items():
        assert torch.equal(tensor, deltas[1][name]) == (".layers.2." in name), name


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (3, "8 experts of .* cannot be put on 3 devices in equal parts"),
        ([[0, 1, 2, 3], [4, 5, 6]], "each of the 8 experts .* exactly one device"),
        ([[0, 1, 2, 3], [3, 4, 5, 6, 7]], "exactly one device"),
        ([[0, 1, 2, 3, 4, 5, 6, 7], []], "no device without experts"),
        ([[0, 1, 2, 3], [4, 5, 6, 8]], "exactly one device"),
    ],
)
def test_devices_that_do_not_fit_the_experts(devices: Any, message: str) -> None:
    layers = moe_layers(tiny("qwen3_moe"))
    with pytest.raises(RecipeError, match=message):
        make_losses(LossSpec(device_balance=0.1, devices=devices), layers, "qwen3_moe")


def test_devices_by_number_have_experts_in_a_row() -> None:
    layer = moe_layers(tiny("qwen3_moe"))[0]
    assert device_groups(4, layer) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert device_groups(DEVICES, layer) == DEVICES


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"load_balence": 0.1}, r'losses.load_balence: unknown key; did you mean "load_balance"'),
        ({"router_z": -1.0}, r"losses.router_z: input should be greater than or equal to 0"),
        ({"device_balance": 0.1}, r"losses.device_balance: needs losses.devices"),
        ({"devices": 2}, r"losses.devices: is for losses.device_balance"),
        ({"device_balance": 0.1, "devices": 0}, r"losses.devices: must be above 0"),
        ({"device_balance": 0.1, "devices": [["a"]]}, r"losses.devices.* valid integer"),
        ({"importance": "much"}, r"losses.importance: input should be a valid number"),
    ],
)
def test_recipes(losses: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"model": "tiny-moe", "data": {"train": "x.jsonl"}, "losses": losses})


def test_a_recipe_is_read_back(tmp_path: Path) -> None:
    made = make_recipe({"model": "tiny-moe", "data": {"train": "x.jsonl"}, "losses": ALL})
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    assert read_recipe(tmp_path / "recipe.yaml") == made
    assert made.losses is not None
    assert made.losses.coefficients() == WEIGHTS

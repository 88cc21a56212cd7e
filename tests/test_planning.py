"""What a run will need, against runs, against hand counts, and for models that are not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esft
from esft.errors import EsftError, ModelError, RecipeError, SelectionError
from esft.plans.records import Plan
from esft.shards import read_header
from tests.checkpoints import save_tiny
from tests.models import EXPERTS, HIDDEN, INNER, LAYERS, tiny

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a tiny model, and `rows.jsonl`."""
    made = tmp_path_factory.mktemp("plan")
    save_tiny(made / "base")
    rows = [{"prompt": f"{n}:", "completion": "abcdef"[n % 6] * 9} for n in range(100)]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def recipe(folder: Path, **keys: Any) -> dict[str, Any]:
    training = {"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "steps"}
    training |= {"save_steps": 1} | keys.pop("training", {})
    data = {"train": str(folder / "rows.jsonl"), "max_length": 64, "loss_on": "all"}
    data |= keys.pop("data", {})
    made = {"model": str(folder / "base"), "device": "cpu", "data": data, "training": training}
    if keys.get("method", "esft") in ("esft", "random", "hot-lora"):
        made["selection"] = {"top_n": 2, "tokens": 64, "seq_len": 32}
    return made | keys


def plan(folder: Path, **keys: Any) -> Plan:
    options = {name: keys.pop(name) for name in ("memory", "processes", "load_in") if name in keys}
    return esft.plan(recipe(folder, **keys), **options)


@pytest.mark.parametrize("method", ["esft", "lora", "hot-lora", "full"])
def test_what_trains_and_what_is_written_are_those_of_the_run(
    method: str, folder: Path, tmp_path: Path
) -> None:
    wanted = recipe(folder, method=method)
    found = esft.plan(wanted)
    result = esft.train(wanted, tmp_path / "run")
    assert found.few is found.many
    case = found.many
    assert case.trained == result.trained
    assert found.total == result.total
    weights = sorted((tmp_path / "run/delta").glob("*.safetensors"))
    assert case.disk.delta == sum(map(payload, weights))
    state = payload(tmp_path / "run/checkpoints/step-000001/state.safetensors")
    # Beside what trains and its optimizer's state: step counters, states of random generators.
    assert 0 <= state - case.disk.checkpoint < 20_000
    assert case.disk.checkpoints == 3 * case.disk.checkpoint  # keep_last, and the one being written


def payload(file: Path) -> int:
    return sum(entry.end - entry.start for entry in read_header(file).values())


def test_memory_by_hand(folder: Path) -> None:
    found = plan(folder)
    model = tiny("qwen3_moe", vocab_size=300)
    total = sum(p.numel() for p in model.parameters())
    expert = 3 * HIDDEN * INNER
    trained = LAYERS * 2 * expert
    memory = found.many.memory
    assert found.parameters["routed_experts"] == LAYERS * EXPERTS * expert
    assert found.parameters["embeddings"] == 2 * 300 * HIDDEN
    assert found.parameters["router"] == LAYERS * EXPERTS * HIDDEN
    assert sum(found.parameters.values()) == total
    assert memory.trained == memory.gradients == memory.start == 4 * trained
    assert memory.optimizer == 2 * 4 * trained
    # And the buffers: the rotary frequencies, the slots of experts.
    assert 4 * (total - trained) <= memory.frozen < 4 * (total - trained) + 2_000
    assert memory.activations is not None
    assert memory.training == memory.without_activations + memory.activations
    assert memory.peak is not None
    assert memory.peak >= memory.training


def test_on_a_gpu_the_checkpoints_dtype_and_fp32_masters(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    config = tmp_path / "base/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    (tmp_path / "base/model.safetensors").unlink()
    found = esft.plan(recipe(folder, model=str(tmp_path / "base"), device=None), device="cuda")
    assert (found.device, found.dtype) == ("cuda", "bfloat16")
    case = found.many
    assert case.memory.trained == 4 * case.trained
    assert case.memory.start == 0
    assert case.disk.delta == 2 * case.trained
    assert not found.stored.measured
    assert found.stored.bytes == 2 * found.total
    assert any("no weights here" in note for note in found.notes)
    narrow = recipe(folder, model=str(tmp_path / "base"), device=None, param_dtype="bfloat16")
    assert esft.plan(narrow, device="cuda").many.memory.trained == 2 * case.trained


def test_a_model_of_a_terabyte_is_planned_from_its_config(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_experts": 1024,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8192,
        "vocab_size": 151_936,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    keys = {"model": str(tmp_path), "data": {"train": "absent.jsonl", "max_length": 4096}}
    found = esft.plan(keys | {"selection": {"top_n": 8}}, device="cuda")
    assert found.stored.bytes > 1200 * GB
    assert found.parameters["routed_experts"] == 3 * 1024 * 3 * 8192 * 8192
    assert found.many.trained == 3 * 8 * 3 * 8192 * 8192
    assert not found.batch.measured
    assert "absent.jsonl" in found.batch.words
    assert found.peak is not None
    assert found.peak > 1200 * GB


def test_the_batch_is_what_the_rows_say(folder: Path) -> None:
    batch = plan(folder).batch
    assert (batch.rows, batch.length, batch.packed, batch.measured) == (2, 64, True, True)
    assert 0 < batch.labelled < 2 * 64
    apart = plan(folder, data={"packing": False}).batch
    assert apart.length < 64
    # A row's first token has no label; all rows are of one length but for the number's digits.
    assert apart.labelled == 2 * (apart.length - 1)


def test_gradient_checkpointing_and_fewer_rows_need_less(folder: Path) -> None:
    data = {"max_length": 256}
    usual = plan(folder, data=data).many.memory.activations
    again = plan(folder, data=data, training={"gradient_checkpointing": True})
    fewer = plan(folder, data=data, training={"per_device_train_batch_size": 1})
    assert usual is not None
    for case in (again.many, fewer.many):
        assert case.memory.activations is not None
        assert case.memory.activations < 0.8 * usual


def test_accumulated_gradients_are_there_while_the_next_batch_is_computed(folder: Path) -> None:
    keys: dict[str, Any] = {"method": "full", "data": {"max_length": 256}}
    once, twice = (
        plan(folder, training={"gradient_accumulation_steps": n}, **dict(keys)).many.memory
        for n in (1, 2)
    )
    assert once.training is not None
    assert twice.training is not None
    assert 0.3 * once.gradients < twice.training - once.training <= once.gradients


def test_what_would_make_it_fit(folder: Path) -> None:
    keys: dict[str, Any] = {
        "routing_drift": False,
        "train": {"experts": "all"},
        "selection": None,
        "data": {"max_length": 256},
        "training": {"per_device_train_batch_size": 4},
    }
    whole = plan(folder, **keys)
    assert whole.peak is not None
    fits = plan(folder, memory=whole.peak, **keys).fit
    assert fits is not None
    assert fits.fits
    assert not fits.changes
    found = plan(folder, memory=int(whole.peak * 0.5), **keys).fit
    assert found is not None
    assert not found.fits
    assert found.changes[0].keys == {
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 4,
    }
    assert [change.fits for change in found.changes] == [False] * (len(found.changes) - 1) + [True]
    # Each figure is the plan of the recipe so changed.
    last = found.changes[-1]
    made = esft.recipe.make_recipe(  # type: ignore[attr-defined]
        recipe(folder, **keys), [f"{key}={value}" for key, value in last.keys.items()]
    )
    assert esft.plan(made).peak == last.peak <= found.memory
    nothing = plan(folder, memory=1000, **keys).fit
    assert nothing is not None
    assert "no change of the recipe" in nothing.verdict
    assert not any(change.fits for change in nothing.changes)


def test_several_processes_by_hand(folder: Path) -> None:
    found = plan(folder, processes=4)
    memory = found.many.memory
    several = found.processes
    assert several is not None
    assert memory.activations is not None
    assert memory.profiling is not None
    fixed = memory.frozen + memory.trained + memory.gradients + memory.optimizer
    rest = memory.activations + memory.start
    # Before training each process has the whole model, to score its part of the sample.
    assert several.loading == memory.profiling > memory.loading
    assert several.replicated == max(fixed + rest + memory.gradients, several.loading)
    assert several.sharded is not None
    assert fixed / 4 + rest < several.sharded < fixed / 4 + rest + 2 * fixed / LAYERS
    assert several.sharded_peak == max(several.sharded, several.loading)
    experts = fixed - memory.frozen + 4 * LAYERS * (EXPERTS - 2) * 3 * HIDDEN * INNER
    assert several.by_expert == fixed - experts + experts // 4 + rest
    assert several.node == found.stored.bytes
    assert several.tokens_per_second is None
    apart = plan(folder, processes=4, selection=selection_file(folder), routing_drift=False)
    assert apart.processes is not None
    assert apart.many.memory.profiling == 0
    assert apart.processes.loading == apart.many.memory.loading
    buckets = fixed + rest + memory.gradients
    assert apart.processes.replicated == pytest.approx(buckets, rel=0.01)


def selection_file(folder: Path) -> str:
    esft.Selection({layer: [0, 1] for layer in range(LAYERS)}).write(folder / "selection.json")
    return str(folder / "selection.json")


def test_what_several_processes_cannot_share(folder: Path) -> None:
    def shares(**keys: Any) -> tuple[bool, bool]:
        several = plan(folder, processes=2, **keys).processes
        assert several is not None
        assert several.replicated
        return several.sharded is not None, several.by_expert is not None

    assert shares(frozen_dtype="int8") == (False, False)
    assert shares(method="lora") == (False, False)
    assert shares(method="full") == (True, False)
    assert shares(train={"router": True}) == (True, False)


@pytest.mark.parametrize(("bits", "weight", "block"), [("4bit", 0.5, 64), ("8bit", 1, None)])
def test_a_request_for_few_bits_leaves_experts_as_they_are(
    bits: str, weight: float, block: int | None, folder: Path
) -> None:
    asked = plan(folder, load_in=bits).load_in
    assert asked is not None
    model = tiny("qwen3_moe", vocab_size=300)
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    narrow = sum(m.weight.numel() for m in linear)
    total = sum(p.numel() for p in model.parameters())
    scales = sum(4 * m.weight.numel() / (block or m.in_features) for m in linear)
    assert asked.quantised == narrow
    assert asked.experts_left == LAYERS * EXPERTS * 3 * HIDDEN * INNER
    assert asked.bytes == int(4 * (total - narrow) + weight * narrow + scales)
    assert asked.expected < asked.bytes
    assert not asked.sound


def test_a_quantised_checkpoint_is_told_by_its_headers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    config = tmp_path / "base/config.json"
    stored = {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | stored))
    found = plan(folder, model=str(tmp_path / "base"))
    assert any("quantised (fp8)" in note and "F32" in note for note in found.notes)


def test_the_same_twice_and_a_run_afterwards_is_unharmed(folder: Path) -> None:
    assert plan(folder).to_dict() == plan(folder).to_dict()
    json.dumps(plan(folder).to_dict())
    model = tiny("qwen3_moe")
    ids = torch.arange(8)[None]
    esft.attach(model, esft.Selection({0: [1]}))
    model(input_ids=ids, labels=ids).loss.backward()


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EsftError, match="--memory much"):
        plan(folder, memory="much")
    with pytest.raises(EsftError, match="--processes 0"):
        plan(folder, processes=0)
    with pytest.raises(EsftError, match="--load-in 3bit"):
        plan(folder, load_in="3bit")
    with pytest.raises(EsftError, match="--device tpu"):
        esft.plan(recipe(folder), device="tpu")
    with pytest.raises(RecipeError, match="did you mean"):
        plan(folder, selektion={})
    with pytest.raises(ModelError, match=r"no config\.json"):
        plan(folder, model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "neverheard"}')
    with pytest.raises(ModelError, match="neverheard"):
        plan(folder, model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    with pytest.raises(ModelError, match="dense"):
        plan(folder, model=str(tmp_path))
    esft.Selection({9: [0]}).write(tmp_path / "selection.json")
    with pytest.raises(SelectionError, match="layer 9"):
        plan(folder, selection=str(tmp_path / "selection.json"))
    shutil.copytree(folder / "base", tmp_path / "base")
    weights = tmp_path / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        plan(folder, model=str(tmp_path / "base"))

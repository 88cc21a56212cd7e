"""DeepSeek-V3's bias update in runs, against counting by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.errors import ModelError, RecipeError
from esft.moe import moe_layers
from esft.recipe_sections import LossSpec
from esft.routers.losses import make_losses
from tests.checkpoints import save_tiny
from tests.expert_calls import watched
from tests.families import small
from tests.models import EXPERTS
from tests.router_runs import in_batches, wanted
from tests.test_gates import moderate
from tests.test_training import metrics
from tests.training_loop import batches


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers choose with a bias."""
    folder = save_tiny(tmp_path_factory.mktemp("biased") / "tiny", "qwen3_moe")
    moderate("deepseek_v3", vocab_size=300).save_pretrained(folder)
    return folder


def biases_of(folder: Path) -> dict[str, Tensor]:
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return {n: t.clone() for n, t in state.items() if n.endswith("e_score_correction_bias")}


@pytest.mark.parametrize(("packing", "size"), [(False, 2), (True, 1)])
def test_the_bias_update_is_the_paper_s(
    biased: Path, data: Path, tmp_path: Path, packing: bool, size: int
) -> None:
    """Two steps of two batches; by hand, each row runs by itself and choices are counted."""
    speed, accumulated = 0.125, 2
    made = wanted(
        biased,
        data,
        {"bias_update": speed},
        method="full",
        packing=packing,
        learning_rate=1e-30,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
    )
    esft.train(made, tmp_path / "run")
    esft.merge(biased, tmp_path / "run" / "delta", tmp_path / "merged")
    found = biases_of(tmp_path / "merged")

    model: Any = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32).eval()
    examples = encode_rows(read_rows(data), AutoTokenizer.from_pretrained(biased))
    by_batch = in_batches(examples, packing, size)
    for step in range(2):
        loads = {layer.name: [0] * EXPERTS for layer in moe_layers(model)}
        for batch in by_batch[step * accumulated : (step + 1) * accumulated]:
            for example in batch:
                with torch.no_grad(), watched(model) as (calls, _):
                    ids = torch.tensor([example.input_ids])
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                for name, ((index, _),) in calls.items():
                    for expert in index.flatten().tolist():
                        loads[name][expert] += 1
        for layer in moe_layers(model):
            mean = sum(loads[layer.name]) / EXPERTS
            for expert, load in enumerate(loads[layer.name]):
                sign = (mean > load) - (mean < load)
                layer.router.e_score_correction_bias[expert] += speed * sign  # type: ignore[union-attr, index]
    expected = {n: b for n, b in model.named_buffers() if n in found}
    assert len(expected) == 2
    for name, bias in expected.items():
        assert torch.equal(found[name], bias), name
        assert bias.any()


def test_the_bias_and_the_values_resume(biased: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"1": [0, 3], "2": [5]}))
    run = tmp_path / "run"
    made = wanted(
        biased,
        data,
        {"bias_update": 0.01, "load_balance": 0.1},
        selection=tmp_path / "s.json",
        train={"router": True},
        max_steps=3,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
    )
    esft.train(made, run)
    whole, lines = (run / "delta" / "esft_delta.safetensors").read_bytes(), metrics(run)
    assert any(
        "e_score_correction_bias" in name
        for name in load_file(run / "delta" / "esft_delta.safetensors")
    )
    shutil.rmtree(run / "delta")
    (run / "README.md").unlink()
    for later in (run / "checkpoints").glob("step-00000[3-9]"):
        shutil.rmtree(later)
    esft.train(made, run, resume=True)
    assert (run / "delta" / "esft_delta.safetensors").read_bytes() == whole
    again = metrics(run)
    assert [line.get("load_balance") for line in again] == [
        line.get("load_balance") for line in lines
    ]


def test_a_bias_in_bfloat16_keeps_small_updates() -> None:
    model = small("deepseek_v3").requires_grad_(True)
    layers = moe_layers(model)
    name = layers[0].name
    layers[0].router.e_score_correction_bias.fill_(1.0)  # type: ignore[union-attr, operator]
    losses = make_losses(LossSpec(bias_update=1e-3), layers, "deepseek_v3")
    assert losses is not None
    ids = batches(1)[0]
    for _ in range(3):
        with losses.watching({"input_ids": ids}) as total:
            model(input_ids=ids, use_cache=False)
        assert total() == 0
        losses.on_optimizer_step(None, None, None)  # type: ignore[arg-type]
    steps = (losses.tensors()[name] - 1) / 1e-3
    assert steps.abs().max() == pytest.approx(3, abs=0.1)


def test_the_bias_update_is_refused_where_it_cannot_be(
    base: Path, data: Path, tmp_path: Path
) -> None:
    spec = LossSpec(bias_update=1e-3)
    frozen = moderate("deepseek_v3").requires_grad_(False)
    with pytest.raises(
        RecipeError, match=r"bias_update: .* frozen; set train: \{router: true\} or method: full"
    ):
        make_losses(spec, moe_layers(frozen), "deepseek_v3")
    made = wanted(base, data, {"bias_update": 1e-3}, method="full")
    with pytest.raises(ModelError, match="qwen3_moe: the routers of this family have no bias"):
        esft.train(made, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    # Told by the configuration alone.
    shutil.copytree(base, tmp_path / "unloadable", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "unloadable" / "model.safetensors").write_bytes(b"no weights")
    made = wanted(tmp_path / "unloadable", data, {"bias_update": 1e-3}, method="full")
    with pytest.raises(ModelError, match="have no bias"):
        esft.train(made, tmp_path / "again")

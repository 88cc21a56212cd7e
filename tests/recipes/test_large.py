"""The recipes for large models, each on a shrunken random model of its family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import esft
from esft.recipe import read_recipe
from esft.run.fields import training_arguments, with_defaults
from esft.shipped import ShippedRecipe, list_recipes
from tests.shrunken import config_of, save_shrunken

LARGE = [recipe for recipe in list_recipes() if recipe.model != "tiny-moe"]
LENGTH, STEPS, BATCH = 64, 2, 32
# Parameters in millions as the makers' model cards give them, less GLM's layer for multi-token
# prediction, which transformers does not load.
PUBLISHED = {
    "Qwen/Qwen3-30B-A3B": 30_532,
    "allenai/OLMoE-1B-7B-0924": 6_919,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706,
    "mistralai/Mixtral-8x7B-v0.1": 46_703,
    "unsloth/gpt-oss-20b-BF16": 20_915,
    "zai-org/GLM-4.5-Air": 106_852,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[n % 7 :] * 5} for n in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_issue_s_models_are_all_there() -> None:
    assert {recipe.model for recipe in LARGE} == set(PUBLISHED)
    assert [r.name for r in LARGE if "DeepSeek" in r.model] == [
        "deepseek-v2-lite-gate",
        "deepseek-v2-lite-token",
    ]


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_kept_configurations_are_those_of_the_models(model: str) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(model)))
    total = sum(parameter.numel() for parameter in made.parameters())
    assert round(total / 1e6) == PUBLISHED[model]


@pytest.mark.parametrize("shipped", LARGE, ids=lambda shipped: shipped.name)
def test_a_recipe_runs_on_a_small_model_of_its_family(
    shipped: ShippedRecipe, data: Path, tmp_path: Path
) -> None:
    base = save_shrunken(tmp_path / "base", shipped.model)
    overrides = [
        f"model={base}",
        f"data.train={data}",
        f"data.max_length={LENGTH}",
        "selection.tokens=512",
        f"selection.seq_len={LENGTH}",
        f"training.max_steps={STEPS}",
        f"training.save_steps={STEPS}",
        "training.logging_steps=1",
    ]
    recipe = read_recipe(shipped.file, overrides)
    result = esft.train(recipe, tmp_path / "run")
    assert result.steps == STEPS
    assert 0 < result.trained < result.total / 2
    # What the optimizer was made with, as the checkpoint has it.
    state = json.loads((tmp_path / f"run/checkpoints/step-{STEPS:06}/state.json").read_text())
    group = state["optimizer"]["param_groups"][0]
    assert group["lr"] == 1e-5
    assert group["betas"] == {"$tuple": [0.9, 0.95]}
    assert group["weight_decay"] == 0.1
    # A batch is 32 rows or blocks, one at a time.
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tokens = json.loads(lines[STEPS - 1])["tokens"]
    if recipe.data.packing:
        assert tokens == STEPS * BATCH * LENGTH
    else:
        assert STEPS * BATCH * 7 < tokens < STEPS * BATCH * LENGTH
    esft.verify(base, result.delta)


@pytest.mark.parametrize("metric", ["token", "gate"])
def test_the_paper_s_settings(metric: str, tmp_path: Path) -> None:
    shipped = next(r for r in LARGE if r.name == f"deepseek-v2-lite-{metric}")
    recipe = with_defaults(read_recipe(shipped.file))
    assert recipe.data.max_length == 4096
    assert recipe.data.packing
    assert not isinstance(recipe.selection, str | None)
    assert recipe.selection.tokens == 32 * recipe.selection.seq_len == 32 * 4096
    # p is 0.2 of the tokens' choices, or 0.1 of the gate values: tests/test_selection.py.
    assert recipe.selection.rule() == {"preset": f"official-{metric}"}
    arguments = training_arguments(recipe, tmp_path)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 32
    assert (arguments.adam_beta1, arguments.adam_beta2) == (0.9, 0.95)
    assert arguments.weight_decay == 0.1
    assert arguments.learning_rate == 1e-5
    assert arguments.max_steps == 500
    assert arguments.lr_scheduler_type == "constant"
    assert arguments.warmup_steps == 0
    assert arguments.optim == "adamw_torch_fused"

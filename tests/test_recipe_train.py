"""The recipe's section `train`, rules that find p, and runs that train more than a selection."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import esft
from esft.delta import read_delta
from esft.errors import EsftError, RecipeError, SelectionError
from esft.recipe import make_recipe, read_recipe
from tests.checkpoints import save_tiny
from tests.notes import Notes

START: dict[str, Any] = {"model": "m", "data": {"train": "t.jsonl"}}


def test_by_default_nothing_but_the_selection_trains() -> None:
    recipe = make_recipe(START)
    assert recipe.train is None
    assert recipe.selects_experts
    made = make_recipe(START | {"train": {"router": True}})
    assert made.selects_experts
    assert made.train is not None
    assert made.train.parts == {
        "shared_experts": None,
        "non_expert_modules": None,
        "router": True,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {expert: all}", 'train.expert: unknown key; did you mean "experts"?'),
        ("train: {experts: some}", "train.experts: input should be 'selection', 'all' or 'none'"),
        ("train: {router: 1}", "train.router: input should be a valid boolean (got 1)"),
        ("train: all", "train: "),
        (
            "train: {experts: none}",
            "train.experts: is none, and so nothing would train; turn on one of "
            "train.shared_experts, train.non_expert_modules, train.router",
        ),
        (
            "train: {experts: none, router: true}\nselection: {p: 0.2}",
            "train.experts: is none, and selection names some; leave one of them out",
        ),
        (
            "train: {experts: all}\nselection: s.json",
            "train.experts: is all, and selection names some; leave one of them out",
        ),
        (
            "train: {experts: all}\nmethod: random",
            "train.experts: is all, which leaves nothing to chance; use method: esft",
        ),
        (
            "train: {router: true}\nmethod: full",
            "train: is for the methods esft and random; with method full everything trains",
        ),
        (
            "train: {router: true}\nmethod: lora",
            "train: is for the methods esft and random; with method lora lora.target_modules says",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\ndata: {{train: t.jsonl}}\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"p": "auto", "cover": 0.4}, None),
        ({"p": 0.3, "group": 2}, None),
        ({"p": "Auto"}, "selection.p: "),
        ({"p": 0.2, "cover": 0.4}, "selection.cover: "),
        ({"p": "auto", "mass": "raw"}, "selection.p: "),
        ({"p": 0.2, "group": 3}, "selection.group: "),
    ],
)
def test_rules_of_esft_select_are_those_of_a_recipe(
    rule: dict[str, Any], message: str | None
) -> None:
    if message is None:
        made: Any = make_recipe(START | {"selection": rule}).selection
        assert made.rule() == rule
        return
    with pytest.raises(RecipeError) as caught:
        make_recipe(START | {"selection": rule})
    assert str(caught.value).startswith(message), str(caught.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("base") / "tiny", "deepseek_v2")
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n}:", "completion": "abcdefgh"[: 1 + n * 5 % 8]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    training = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
    }
    return {
        "model": base,
        "data": {"train": data, "max_length": 32},
        "training": training | changes.pop("training", {}),
        "dtype": "checkpoint",  # bf16: parts have fp32 masters
        **changes,
    }


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def names(run: Path) -> set[str]:
    return set(read_delta(run / "delta").entries)


def part(base: Path, *words: str) -> set[str]:
    return {name for name in weights(base) if any(word in name for word in words)}


def test_a_run_without_experts(base: Path, data: Path, tmp_path: Path) -> None:
    parts = {"experts": "none", "shared_experts": True, "router": True}
    run = esft.train(recipe(base, data, train=parts), tmp_path / "run")
    wanted = part(base, "shared_experts", "mlp.gate.")
    assert names(run.out) == wanted
    assert not (run.out / "selection.json").exists()  # nothing was profiled
    assert not (run.out / "scores.json").exists()
    config = json.loads((run.delta / "esft_config.json").read_text())
    assert not config.keys() & {"selection", "scores"}
    merged = weights(esft.merge(base, run.delta, tmp_path / "merged"))
    before = weights(base)
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == wanted
    assert run.trained == sum(before[name].numel() for name in wanted)
    assert esft.evaluate(base, data, delta=run.delta).loss < esft.evaluate(base, data).loss


def test_a_run_of_all_experts(base: Path, data: Path, tmp_path: Path) -> None:
    run = esft.train(recipe(base, data, train={"experts": "all"}), tmp_path / "run")
    assert names(run.out) == part(base, ".experts.")
    assert not (run.out / "scores.json").exists()
    assert "| experts | all |" in (run.out / "README.md").read_text()


def test_a_control_by_chance_with_parts(base: Path, data: Path, tmp_path: Path) -> None:
    options = {"method": "random", "selection": {"top_n": 1, "tokens": 64}}
    run = esft.train(
        recipe(base, data, train={"non_expert_modules": True}, **options), tmp_path / "run"
    )
    assert run.method == "random"
    chosen = json.loads((run.out / "selection.json").read_text())["experts"]
    experts = [f"layers.{layer}.mlp.experts.{ids[0]}." for layer, ids in chosen.items()]
    others = weights(base).keys() - part(base, ".experts.", "shared_experts", "mlp.gate.")
    assert names(run.out) == part(base, *experts) | others
    assert "| also trained | non_expert_modules |" in (run.out / "README.md").read_text()


def test_a_selection_file_s_flags_are_followed_unless_the_recipe_says_otherwise(
    base: Path, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "selection.json"
    flags = {"shared_experts": True, "non_expert_modules": True}
    file.write_text(json.dumps({"experts": {"1": [5]}, **flags}))
    made = recipe(base, data, selection=str(file), training={"max_steps": 1})
    esft.train(made, tmp_path / "all")
    everything = weights(base).keys() - part(base, ".experts.")
    expert = part(base, "layers.1.mlp.experts.5.")
    assert names(tmp_path / "all") == everything | expert
    esft.train(made | {"train": {"non_expert_modules": False}}, tmp_path / "shared")
    assert names(tmp_path / "shared") == part(base, "shared_experts") | expert


def test_a_part_that_the_model_lacks_is_told(data: Path, tmp_path: Path) -> None:
    base, notes = save_tiny(tmp_path / "base", "mixtral"), Notes()
    made = recipe(base, data, selection={"top_n": 1, "tokens": 64}, training={"max_steps": 1})
    esft.train(made | {"train": {"shared_experts": True}}, tmp_path / "run", reporter=notes)
    assert "shared_experts: this model has none; nothing of them trains" in notes.notes
    alone = {"experts": "none", "shared_experts": True}
    with pytest.raises(SelectionError, match="nothing would train"):
        esft.train(recipe(base, data, train=alone), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_with_parts_goes_on_to_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    """What is saved are the masters: bf16 weights would not do."""
    parts = {"shared_experts": True, "non_expert_modules": True, "router": True}
    made = recipe(
        base,
        data,
        selection={"top_n": 1, "tokens": 64},
        train=parts,
        training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    )
    esft.train(made, tmp_path / "run")
    expected = weights(tmp_path / "run" / "delta")
    for folder in ("delta", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "run" / folder)
    esft.train(made, tmp_path / "run", resume=True)
    found = weights(tmp_path / "run" / "delta")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_resumed_run_trains_what_the_killed_one_did(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Also where the flags of the selection's file say it."""
    file = tmp_path / "selection.json"
    file.write_text('{"experts": {"1": [5]}}')
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    made = recipe(base, data, selection=str(file), training=saving)
    esft.train(made, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "delta")
    file.write_text('{"experts": {"1": [5]}, "shared_experts": true}')
    with pytest.raises(EsftError, match=r"selection\.shared_experts: False then, True now"):
        esft.train(made, tmp_path / "run", resume=True)


def test_p_is_found_while_training(base: Path, data: Path, tmp_path: Path) -> None:
    rule = {"p": "auto", "cover": 0.3, "tokens": 96}
    made = recipe(base, data, selection=rule, training={"max_steps": 1})
    run = esft.train(made, tmp_path / "run")
    written = json.loads((run.out / "selection.json").read_text())["rule"]
    assert written["auto"]["cover"] == 0.3
    assert 0 < written["p"] <= 1

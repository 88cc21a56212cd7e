"""Whole runs of the methods beside ESFT: what they draw, how they resume, how large they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import esft
from esft.errors import RecipeError, SelectionError
from esft.recipe import make_recipe
from esft.scores import UNKNOWN_MODEL, LayerScores, Scores
from esft.selection import Selection, select
from tests.checkpoints import save_tiny
from tests.notes import Notes
from tests.resumed_runs import cut_back, delta_bytes, files_of, logged, recipe, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


MATCHED = {"method": "lora", "lora": {"match": "esft"}}


def run_of(base: Path, data: Path, keys: dict[str, Any], **training: Any) -> dict[str, Any]:
    given = {"selection": {"p": 0.4, "tokens": 200}} | keys
    return recipe(base, data, max_steps=6, **training) | given


@pytest.mark.parametrize("keys", [{"method": "hot-lora"}, MATCHED], ids=["hot-lora", "matched"])
def test_a_run_cut_short_resumes_to_the_same_bits(
    base: Path, data: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    wanted = run_of(base, data, keys)
    esft.train(wanted, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut_back(tmp_path / "cut", 4)
    result = esft.train(wanted, tmp_path / "cut", resume=True)
    assert result.steps == 6
    assert delta_bytes(tmp_path / "cut") == delta_bytes(tmp_path / "whole")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_a_run_of_factors_is_used_like_any_other(base: Path, data: Path, tmp_path: Path) -> None:
    run = esft.train(run_of(base, data, {"method": "hot-lora", "lora": {"r": 3}}), tmp_path / "run")
    merged = esft.merge(base, run.delta, tmp_path / "merged")
    esft.verify(base, run.delta, merged)
    with_delta = esft.evaluate(base, data, delta=run.delta)
    assert with_delta == esft.evaluate(merged, data)
    assert with_delta != esft.evaluate(base, data)
    # Back, and written out as an ordinary delta.
    esft.unmerge(merged, run.delta, tmp_path / "back", base=base)
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (base / weights).read_bytes()
    esft.export(run.delta, tmp_path / "whole", base=base)
    again = esft.merge(base, tmp_path / "whole", tmp_path / "again")
    assert (again / weights).read_bytes() == (merged / weights).read_bytes()
    manifest = json.loads((run.delta / "esft_config.json").read_text())
    assert manifest["low_rank"] == {"r": 3, "alpha": 6}
    assert manifest["adapter"] == run.adapter


def test_the_matched_rank_is_the_nearest(base: Path, data: Path, tmp_path: Path) -> None:
    # Of one layer's stacks alone, so that a rank is small beside ESFT's delta.
    targets = {"target_modules": ["q_proj"], "target_parameters": []}
    keys = {"method": "lora", "lora": {"match": "esft", **targets}}
    notes = Notes()
    run = esft.train(run_of(base, data, keys), tmp_path / "run", reporter=notes)
    rank_one = esft.train(
        run_of(base, data, {"method": "lora", "lora": {"r": 1, **targets}, "selection": None}),
        tmp_path / "one",
    )
    selection = Selection.read(tmp_path / "run" / "matched_selection.json")
    plain = esft.train(run_of(base, data, {"method": "esft"}), tmp_path / "esft")
    assert Selection.read(tmp_path / "esft" / "selection.json").experts == selection.experts

    def tensor_bytes(folder: Path) -> int:
        tensors = [t for file in folder.glob("*.safetensors") for t in load_file(file).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    adapter = run.adapter
    assert adapter is not None
    size, one = tensor_bytes(run.delta), tensor_bytes(rank_one.delta)
    assert adapter["esft_bytes"] == tensor_bytes(plain.delta)
    assert (adapter["bytes"], adapter["alpha"]) == (size, 2 * adapter["r"])
    assert size == one * adapter["r"]
    assert adapter["r"] > 2
    assert abs(size - adapter["esft_bytes"]) <= one / 2
    expected = f"lora.match: rank {adapter['r']}: an adapter of {size:,} bytes, where ESFT's delta"
    assert any(note.startswith(expected) for note in notes.notes)
    assert not (tmp_path / "run" / "selection.json").exists()  # nothing of it trained
    written = json.loads((run.delta / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (adapter["r"], adapter["alpha"])


def test_the_lowest_rank_is_one(base: Path, data: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "lora", "lora": {"match": "esft", "alpha": 5}}
    keys["selection"] = {"top_n": 1, "layers": 0}
    run = esft.train(run_of(base, data, keys), tmp_path / "run")
    assert run.adapter is not None
    assert (run.adapter["r"], run.adapter["alpha"]) == (1, 5)
    assert run.adapter["bytes"] > run.adapter["esft_bytes"]


def test_a_control_of_the_unselected(base: Path, data: Path, tmp_path: Path) -> None:
    rule = {"p": 0.4, "tokens": 200, "random_from": "unselected"}
    esft.train(run_of(base, data, {"method": "random", "selection": rule}), tmp_path / "random")
    scores = esft.Scores.read(tmp_path / "random" / "scores.json")
    drawn = Selection.read(tmp_path / "random" / "selection.json")
    best = select(scores, p=0.4)
    for layer, ids in drawn.experts.items():
        assert len(ids) == len(best.experts[layer])
        assert not set(ids) & set(best.experts[layer])
    assert drawn.rule["random_from"] == "unselected"


def test_hot_lora_of_weights_that_were_rounded_is_refused(
    base: Path, data: Path, tmp_path: Path
) -> None:
    # The base is float32: factors would be added to other values than those that they trained on.
    wanted = run_of(base, data, {"method": "hot-lora"}) | {"dtype": "bfloat16"}
    with pytest.raises(esft.EsftError, match=r"float32 in the base.*set dtype: checkpoint"):
        esft.train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists() or not files_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "hot-lora", "lora": {"match": "esft"}}, "lora.match: is for method: lora; hot"),
        (
            {"method": "hot-lora", "lora": {"target_modules": ["q"]}},
            "lora.target_modules: is for method: lora; hot-lora adapts the selected experts",
        ),
        ({"method": "hot-lora", "train": {"router": True}}, "the selected experts have adapters"),
        ({"method": "lora", "lora": {"match": "esft", "r": 4}}, "lora.match: chooses the rank"),
        ({"method": "lora", "lora": {"match": "all"}}, "lora.match: input should be 'esft'"),
        ({"method": "full", "lora": {}}, "lora: is for the methods lora and hot-lora, not full"),
        ({"method": "esft", "selection": {"random_from": "all"}}, "give random too"),
        (
            {"method": "random", "selection": {"random_from": "some"}},
            "selection.random_from: input should be 'all' or 'unselected'",
        ),
    ],
)
def test_what_a_recipe_cannot_ask_for(data: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"model": "tiny-moe", "data": {"train": str(data)}} | keys)


def test_a_control_needs_as_many_others() -> None:
    layers = {0: LayerScores(4, 1, 9, [0.3, 0.3, 0.2, 0.2], [0.25] * 4)}
    scores = Scores(layers, model=UNKNOWN_MODEL, sample={"count": "all"})
    drawn = select(scores, top_n=2, random=0, random_from="unselected")
    assert drawn.experts == {0: [2, 3]}
    with pytest.raises(SelectionError, match=r"layer 0 the rule selects 3 of 4 experts.*from all"):
        select(scores, top_n=3, random=0, random_from="unselected")
    with pytest.raises(SelectionError, match="--random-from says what --random draws from"):
        select(scores, top_n=2, random_from="all")
    same = select(scores, top_n=2, random=5, random_from="all").experts
    assert same == select(scores, top_n=2, random=5).experts

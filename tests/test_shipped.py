"""The recipes that ship: listed, copied, and each headed by what it is and how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest

import esft
from esft.errors import EsftError, OutputError, RecipeError
from esft.recipe import read_recipe
from esft.shipped import DEFAULT, ShippedRecipe, find_recipe, list_recipes
from tests.command import ROOT, esft_json, refusal
from tests.command import esft as run_esft

SHIPPED = list_recipes()
ONE_METHOD = [recipe for recipe in SHIPPED if recipe.command == "train"]


def name_of(recipe: ShippedRecipe) -> str:
    return recipe.name


def test_every_file_of_the_folder_is_listed_once() -> None:
    names = [recipe.name for recipe in SHIPPED]
    assert sorted(names) == sorted(file.stem for file in (ROOT / "recipes").iterdir())
    assert {"esft-token", "esft-gate", "lora", "full"} < set(names)
    # Those that run anywhere come first.
    anywhere = [recipe.model == "tiny-moe" for recipe in SHIPPED]
    assert anywhere == sorted(anywhere, reverse=True)


@pytest.mark.parametrize("recipe", SHIPPED, ids=name_of)
def test_the_head_says_what_it_is_how_to_launch_it_and_what_it_needs(
    recipe: ShippedRecipe,
) -> None:
    head = recipe.file.read_text().partition("\nmodel:")[0]
    assert all(line == "#" or line.startswith("# ") for line in head.splitlines())
    assert head.splitlines()[0] == f"# {recipe.summary}"
    assert 20 < len(recipe.summary) < 90
    assert f"\n#   esft init {recipe.name}\n" in head
    assert f"\n#   esft {recipe.command} recipe.yaml --out runs/{recipe.name}\n" in head
    by_plan = ", by `esft plan`: " if recipe.command == "train" else ""
    assert f"\n# Needs{by_plan}" in head
    assert max(map(len, recipe.file.read_text().splitlines())) <= 100


@pytest.mark.parametrize("recipe", ONE_METHOD, ids=name_of)
def test_every_recipe_is_valid(recipe: ShippedRecipe) -> None:
    read = read_recipe(recipe.file)
    assert (read.model, read.method) == (recipe.model, recipe.method)


def test_a_copy_reads_as_the_shipped_one_does_wherever_it_lies(tmp_path: Path) -> None:
    for recipe in ONE_METHOD:
        copy = esft.init_recipe(recipe.name, tmp_path / "mine" / f"{recipe.name}.yaml")
        assert copy.read_bytes() == recipe.file.read_bytes()
        if recipe.model == "tiny-moe":
            data = read_recipe(copy).data
            assert data == read_recipe(recipe.file).data
            assert Path(str(data.train)).is_file()


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(OutputError, match=r"recipe\.yaml: a file is in the way"):
        esft.init_recipe(DEFAULT, tmp_path / "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    (tmp_path / "link.yaml").symlink_to("nowhere.yaml")
    with pytest.raises(OutputError):
        esft.init_recipe(DEFAULT, tmp_path / "link.yaml")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("esft-tokens", 'did you mean "esft-token"?'),
        ("qwen3-30b", 'did you mean "qwen3-30b-a3b"?'),
        ("quux", "there are "),
    ],
)
def test_an_unknown_name_is_refused_by_the_nearest(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"^{name}: no such recipe ships; {hint}") as caught:
        esft.init_recipe(name, tmp_path / "recipe.yaml")
    assert isinstance(caught.value, EsftError)
    assert not list(tmp_path.iterdir())


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = esft_json("recipes")["recipes"]
    assert [item["name"] for item in listed] == [recipe.name for recipe in SHIPPED]
    assert set(listed[0]) == {"name", "summary", "model", "method", "file", "command"}
    table = run_esft("recipes").stdout
    for recipe in SHIPPED:
        assert recipe.summary[:30] in table  # a long one goes on in the next line
        assert f"{recipe.name}  " in table
    result = run_esft("init")
    assert result.stdout.endswith("next: esft train recipe.yaml --out runs/esft-token\n")
    assert Path("recipe.yaml").read_bytes() == find_recipe("esft-token").file.read_bytes()
    assert "a file is in the way" in refusal("init")
    made = esft_json("init", "olmoe-1b-7b", "--out", "o.yaml")
    assert made["out"] == "o.yaml"
    assert made["next"] == "esft train o.yaml --out runs/olmoe-1b-7b"
    assert made["recipe"]["model"] == "allenai/OLMoE-1B-7B-0924"


def test_init_then_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands of the head, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    assert run_esft("init").returncode == 0
    few = ["--steps", 1, "--set", "evaluation.max_rows=1", "--set", "selection.tokens=512"]
    few += ["--set", "evaluation.general_max_rows=1", "--set", "data.eval_rows=1"]
    result = run_esft("train", "recipe.yaml", "--out", "run", *few)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "delta" / "esft_config.json").is_file()

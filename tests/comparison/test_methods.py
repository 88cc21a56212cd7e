"""The table of compared methods: each gives a recipe that is valid, and trains what it says."""

from __future__ import annotations

import pytest

from esft.comparison.methods import METHODS, method_keys, with_keys
from esft.errors import RecipeError
from esft.recipe import make_recipe

BASE = {
    "model": "tiny-moe",
    "method": "full",
    "selection": {"metric": "gate", "p": 0.3},
    "train": {"router": True},
    "data": {"train": "rows.jsonl"},
    "lora": {"r": 4},
    "param_dtype": "bfloat16",
    "frozen_dtype": "nf4",
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_valid_recipe(name: str) -> None:
    recipe = make_recipe(with_keys(BASE, method_keys(name)))
    assert recipe.method == name.split("-")[0] or recipe.method in ("esft", "hot-lora")


def test_the_metric_is_named_or_the_base_recipes() -> None:
    def rule(name: str) -> object:
        return with_keys(BASE, method_keys(name))["selection"]

    assert rule("esft-token") == {"metric": "token", "p": 0.3}
    assert rule("esft-gate") == rule("esft-shared") == {"metric": "gate", "p": 0.3}


def test_a_selection_file_is_replaced_by_a_rule() -> None:
    base = BASE | {"selection": "mine.json"}
    assert with_keys(base, method_keys("esft-gate"))["selection"] == {"metric": "gate"}


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match='"esft-tokens" to compare; did you mean "esft-token"'):
        method_keys("esft-tokens")
    with pytest.raises(RecipeError, match="choose from esft-token, esft-gate"):
        method_keys("xxxxxxxx")


def test_the_table_cannot_be_changed_through_what_it_gives() -> None:
    method_keys("esft-shared")["train"]["shared_experts"] = False
    assert method_keys("esft-shared")["train"] == {"shared_experts": True}


def test_the_base_stays_as_it_is() -> None:
    with_keys(BASE, {"selection": {"p": None, "top_n": 2}})
    assert BASE["selection"] == {"metric": "gate", "p": 0.3}
    merged = with_keys(BASE, {"selection": {"p": None, "top_n": 2}})
    assert merged["selection"] == {"metric": "gate", "top_n": 2}

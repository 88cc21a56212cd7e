"""The recipe's `frozen_dtype`: what it may say, and with what it contradicts."""

from __future__ import annotations

from typing import Any

import pytest

from esft.errors import RecipeError
from esft.recipe import make_recipe, read_recipe
from esft.recipe_sections import Recipe
from esft.run.guard import recipe_identity

BASE: dict[str, Any] = {"model": "m", "data": {"train": "t"}}


def recipe(**keys: Any) -> Recipe:
    return make_recipe(BASE | keys)


def test_one_word_is_of_experts_and_linear_layers() -> None:
    assert recipe().frozen.kinds == {}
    assert recipe(frozen_dtype="nf4").frozen.kinds == {"experts": "nf4", "linear": "nf4"}
    parts = {"experts": "nf4", "embeddings": "int8"}
    assert recipe(frozen_dtype=parts).frozen.kinds == parts


@pytest.mark.parametrize("given", ["int8", {"linear": "nf4"}])
def test_read_back_as_written(given: object, tmp_path: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(frozen_dtype=given).to_yaml())
    assert read_recipe(path).frozen == recipe(frozen_dtype=given).frozen


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"frozen_dtype": "int4"}, "expected int8, nf4, or one of them a part (got 'int4')"),
        ({"frozen_dtype": 8}, "expected int8, nf4, or one of them a part (got 8)"),
        ({"frozen_dtype": {"experts": "fp4"}}, "input should be 'int8' or 'nf4' (got 'fp4')"),
        ({"frozen_dtype": {"expert": "nf4"}}, 'unknown key; did you mean "experts"?'),
        ({"frozen_dtype": {}}, "names no part; give one of experts, linear, embeddings"),
        ({"frozen_dtype": "nf4", "method": "full"}, "method full trains every weight"),
        ({"frozen_dtype": "nf4", "method": "lora"}, "method: hot-lora trains factors"),
        (
            {"frozen_dtype": {"experts": "nf4"}, "train": {"experts": "all"}},
            "frozen_dtype.experts: all experts train",
        ),
        (
            {"frozen_dtype": {"embeddings": "nf4"}, "train": {"non_expert_modules": True}},
            "frozen_dtype.embeddings: embeddings train",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**keys)
    assert message in str(caught.value)
    assert "frozen_dtype" in str(caught.value)


def test_what_a_word_means_beside_parts_that_train() -> None:
    # Only what is asked for by its name contradicts; a word means what is left.
    recipe(frozen_dtype="nf4", train={"experts": "all"})
    recipe(frozen_dtype="nf4", train={"non_expert_modules": True})


def test_a_run_without_it_is_the_run_that_older_checkpoints_tell_of() -> None:
    assert "frozen_dtype" not in recipe_identity(recipe())["recipe"]
    assert recipe_identity(recipe(frozen_dtype="nf4"))["recipe"]["frozen_dtype"] == "nf4"

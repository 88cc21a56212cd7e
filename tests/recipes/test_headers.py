"""What a recipe's head says that it needs is what `esft plan` says."""

from __future__ import annotations

import pytest

from esft.shipped import find_recipe
from tools.recipe_headers import headed


# One of each kind: the tiny model on a CPU, a large one by bounds, one by published profiles. The
# largest take a minute each and are planned in the same way.
@pytest.mark.parametrize(
    "name",
    ["esft-token", "olmoe-1b-7b", pytest.param("deepseek-v2-lite-token", marks=pytest.mark.slow)],
)
def test_the_head_has_the_figures_of_the_plan(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.file.read_text() == headed(recipe), f"python -m tools.recipe_headers {name}"

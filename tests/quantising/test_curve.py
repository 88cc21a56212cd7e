"""The loss over rounded frozen weights stays within 2 % of the loss over the loaded ones."""

from __future__ import annotations

import pytest

from bench.frozen_dtype import STEPS, losses


@pytest.fixture(scope="module")
def as_loaded() -> list[float]:
    return losses({})


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "apart"), [("int8", 0.002), ("nf4", 0.02)])
def test_every_step_of_tiny_moe(as_loaded: list[float], kind: str, apart: float) -> None:
    own = losses({"experts": kind, "linear": kind})
    assert len(own) == len(as_loaded) == STEPS
    for step, (mine, its) in enumerate(zip(own, as_loaded, strict=True)):
        assert abs(mine / its - 1) < apart, step
    assert own[0] != as_loaded[0]

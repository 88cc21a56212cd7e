"""Steps whose numbers are none: what an optimizer is let do, and when the host looks."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esft.errors import EsftError
from esft.run.divergence import FiniteSteps

WHERE = [["f:1", "f:2"], ["f:3"], ["f:4", "f:5", "f:6"]]
FUSED = [("adamw", {"fused": True}), ("sgd", {"fused": True, "momentum": 0.9})]
OTHERS = [("adamw", {"fused": False}), ("sgd", {"momentum": 0.9})]


def optimizer_of(kind: str, weight: Tensor, options: dict[str, object]) -> torch.optim.Optimizer:
    made = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    return made([weight], lr=0.1, **options)  # type: ignore[arg-type]


def take(
    finite: FiniteSteps,
    number: int,
    weight: Tensor,
    optimizer: torch.optim.Optimizer,
    gradient: float,
    losses: tuple[float, ...] = (1.0,),
) -> None:
    weight.grad = torch.full_like(weight, gradient)
    for item, loss in enumerate(losses):
        finite.add(torch.tensor(loss), [item])
    finite.before_step(number, weight.grad.norm(), optimizer)
    optimizer.step()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("kind", "options"), [*FUSED, *OTHERS])
def test_a_bad_step_changes_nothing(
    tmp_path: Path, kind: str, options: dict[str, object], bad: float
) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optimizer_of(kind, weight, options)
    finite = FiniteSteps(WHERE, tmp_path / "diverged.json")
    take(finite, 1, weight, optimizer, 0.5)
    finite.check()
    before = weight.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[weight].items()}
    assert not torch.equal(before, torch.tensor([1.0, 2.0]))
    if (kind, options) in FUSED:
        # The step is skipped on the device; the host learns of it later.
        take(finite, 2, weight, optimizer, bad, (1.0, 2.0, 3.0))
        assert not (tmp_path / "diverged.json").exists()
        learn = finite.check
    else:
        learn = partial(take, finite, 2, weight, optimizer, bad, (1.0, 2.0, 3.0))
    with pytest.raises(EsftError, match=r"^step 2: the gradient is (nan|inf), with the rows f:1, "):
        learn()
    assert torch.equal(weight, before)
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert [batch["rows"] for batch in report["batches"]] == WHERE
    finite.check()  # said once


def test_the_batch_with_the_bad_loss_is_named(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of("adamw", weight, {"fused": False})
    finite = FiniteSteps(WHERE, tmp_path / "diverged.json")
    with pytest.raises(EsftError) as caught:
        take(finite, 7, weight, optimizer, 0.5, (1.0, torch.inf, 2.0))
    assert str(caught.value) == (
        f"step 7: the loss is inf, with the rows f:3 (all in {tmp_path / 'diverged.json'}); no "
        f"weight was changed by this step; the run has diverged and is stopped; try a lower "
        f"training.learning_rate"
    )
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert [batch["loss"] for batch in report["batches"]] == ["1.0", "inf", "2.0"]


def test_a_scaled_gradient_may_overflow_but_no_loss(tmp_path: Path) -> None:
    # The scaler itself skips such a step, and scales less.
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = optimizer_of("adamw", weight, {"fused": True})
    finite = FiniteSteps(WHERE, tmp_path / "diverged.json")
    finite.add(torch.tensor(1.0), [0])
    finite.before_step(1, torch.tensor(torch.inf), optimizer, scaled=True)
    assert not hasattr(optimizer, "found_inf")
    finite.add(torch.tensor(torch.nan), [0])
    with pytest.raises(EsftError, match=r"^step 2: the loss is nan, with the rows f:1, f:2 \(all"):
        finite.before_step(2, torch.tensor(1.0), optimizer, scaled=True)


def test_good_steps_are_those_of_the_optimizer_alone(tmp_path: Path) -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    guarded, bare = (optimizer_of("adamw", weight, {"fused": True}) for weight in weights)
    finite = FiniteSteps(WHERE, tmp_path / "diverged.json")
    for number in range(1, 6):
        take(finite, number, weights[0], guarded, 1 / number)
        weights[1].grad = torch.full_like(weights[1], 1 / number)
        bare.step()
    finite.check()
    assert torch.equal(*weights)

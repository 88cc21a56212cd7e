"""NaN and infinity stop a run before they reach a weight, and the rows they came from are named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from esft import processes
from esft.errors import ElsewhereError, EsftError
from esft.files import write_json

_ROWS_NAMED = 4  # in the message; the file has all


class _Batch(NamedTuple):
    loss: Tensor
    items: Sequence[int]


class FiniteSteps:
    """Lets an optimizer take a step only if the step's losses and gradient are finite.

    One check a step, on the sum of the losses and the gradient's norm, which the loop computes
    anyway. Reading its outcome would make the host wait for a GPU. An optimizer that can skip a
    step on the device by itself (torch's fused ones, through what a `torch.amp.GradScaler` tells
    them) is told there, and the host reads the outcome where it waits anyway: at the next batch,
    whose labels are searched, or before something is logged, scored or saved. For any other
    optimizer it is read before the step.

    Of several processes all stop where one has met such a loss, and the first one tells and
    reports the rows of all.

    Args:
        where: of each item of the training set, the `file:line` of its rows.
        report: file that says what was not finite, and which rows the step had.
    """

    def __init__(self, where: Sequence[Sequence[str]], report: Path) -> None:
        self._where, self._report = where, report
        self._batches: list[_Batch] = []
        self._pending: tuple[int, list[_Batch], Tensor, Tensor] | None = None

    def add(self, loss: Tensor, items: Sequence[int]) -> None:
        """Note a batch's loss (a scalar) and which items of the training set it had."""
        self._batches.append(_Batch(loss, items))

    def before_step(
        self, step: int, norm: Tensor, optimizer: torch.optim.Optimizer, *, scaled: bool = False
    ) -> None:
        """Arm the optimizer's next step.

        Args:
            step: its number, from 1.
            norm: of the gradient, a scalar.
            optimizer: about to take the step.
            scaled: whether a `GradScaler` scales the loss. It checks the gradient by itself: one
                that overflows fp16 makes it skip the step and scale less, and is no divergence.

        Raises:
            EsftError: see `check`.
        """
        batches, self._batches = self._batches, []
        total = torch.stack([batch.loss for batch in batches]).sum()
        bad = (total if scaled else total + norm).isfinite().logical_not().float()
        if processes.count() > 1:  # on the device, where the gradients have just been exchanged
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        self._pending = step, batches, norm, bad
        if not scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
        else:
            self.check()

    def check(self) -> None:
        """Read the outcome of the last step.

        Raises:
            EsftError: its losses or gradient were not finite. The weights are as before the step;
                the report is written.
        """
        if self._pending is None:
            return
        step, batches, norm, bad = self._pending
        self._pending = None
        if not bad:
            return
        own = [
            (float(batch.loss), [row for item in batch.items for row in self._where[item]])
            for batch in batches
        ]
        told = [batch for each in processes.gathered(own, "train") for batch in each]
        losses, rows = [loss for loss, _ in told], [names for _, names in told]
        culprits = [n for n, loss in enumerate(losses) if not math.isfinite(loss)]
        quantity = "loss" if culprits else "gradient"
        value = losses[culprits[0]] if culprits else float(norm)
        if not processes.is_main():
            raise ElsewhereError(f"step {step}: the {quantity} is {value}")
        report: dict[str, Any] = {
            "step": step,
            "quantity": quantity,
            "value": str(value),  # JSON has no NaN
            "gradient_norm": str(float(norm)),
            "batches": [
                {"loss": str(loss), "rows": names} for loss, names in zip(losses, rows, strict=True)
            ],
        }
        write_json(self._report, report)
        named = [row for n in culprits or range(len(rows)) for row in rows[n]]
        more = f" and {len(named) - _ROWS_NAMED} more" if len(named) > _ROWS_NAMED else ""
        raise diverged(
            step,
            f"the {quantity} is {value}, with the rows {', '.join(named[:_ROWS_NAMED])}{more} "
            f"(all in {self._report}); no weight was changed by this step",
        )


def diverged(step: int, what: str) -> EsftError:
    """Make the error of a run that cannot go on."""
    return EsftError(
        f"step {step}: {what}; the run has diverged and is stopped; try a lower "
        f"training.learning_rate"
    )

"""The recipe's losses of routers, added to a task's loss while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from esft import processes
from esft.data.documents import documents
from esft.errors import RecipeError
from esft.moe import MoeLayer, text_config
from esft.progress import SILENT, Reporter
from esft.recipe_sections import LossSpec
from esft.routers import balance
from esft.routers.bias_update import BiasUpdate
from esft.routers.watch import RouterPass, RouterWatch

# Of one layer's pass over a batch; `row_T` is the number of each token's row, -1 for padding.
_Loss = Callable[[RouterPass, Tensor], Tensor]


class RouterLosses(TrainerCallback, ExportableState):
    """Losses of what routers compute, averaged over layers; and the bias update after a step.

    The mean over layers, unlike a sum, makes a coefficient mean the same in a deep model and in a
    shallow one, and a value readable: `expert_balance` is 1 where all is even.

    A callback of the trainer that adds them, so that it is told of steps, and saves the sums.

    Args:
        spec: coefficients.
        layers: of the model, found before PEFT wraps it.
        family: the model's type, for messages.

    Raises:
        ModelError: the routers cannot be watched, or have no bias to update.
        RecipeError: `devices` do not fit the experts.
    """

    def __init__(self, spec: LossSpec, layers: Sequence[MoeLayer], family: str) -> None:
        self._watch = RouterWatch(layers)
        self._coefficients = spec.coefficients()
        self._losses = {name: _losses(spec)[name] for name in self._coefficients}
        for layer in self._watch.layers if spec.device_balance else ():
            device_groups(spec.devices, layer)
        self._bias = (
            BiasUpdate(self._watch.layers, spec.bias_update, family) if spec.bias_update else None
        )
        # Each loss's sum over the batches since `means` was last called, and last how many these
        # are: of the step under way those of this process, of the steps before it those of all.
        self._step_sums: Tensor | None = None
        self._sums: Tensor | None = None

    @property
    def sums(self) -> list[float] | None:
        """What `means` is made of, for checkpoints."""
        return None if self._sums is None else self._sums.tolist()

    @sums.setter
    def sums(self, values: list[float] | None) -> None:
        self._sums = None if values is None else torch.tensor(values)

    @contextmanager
    def watching(
        self, batch: Mapping[str, Any], *, learnt: bool = True
    ) -> Generator[Callable[[], Tensor]]:
        """Watch the routers during the forward pass in the block.

        Args:
            batch: what the model runs on, see `esft.data.documents.documents`.
            learnt: whether it counts; one that fills up a step of several processes does not.

        Yields:
            a function to call after the block. It returns the losses times their coefficients,
            summed; their values are kept for `means`, and who was chosen for the step's end.
        """
        row_T = documents(batch)
        if not learnt:
            row_T = torch.full_like(row_T, -1)
        with self._watch.watching() as seen:
            yield lambda: self._total(self._watch.passes(seen, tokens=len(row_T)), row_T, learnt)

    def _total(self, passes: Sequence[RouterPass], row_T: Tensor, learnt: bool) -> Tensor:
        if self._bias is not None:
            self._bias.count(passes, row_T >= 0)
        total = torch.zeros((), device=row_T.device)
        if learnt:
            values = {
                name: torch.stack([loss(x, row_T) for x in passes]).mean()
                for name, loss in self._losses.items()
            }
            for name, value in values.items():
                total = total + self._coefficients[name] * value
            found = torch.stack([*(v.detach() for v in values.values()), torch.ones_like(total)])
        else:
            found = total.new_zeros(len(self._losses) + 1)
        self._step_sums = found if self._step_sums is None else self._step_sums + found
        return total

    def _settle(self) -> None:
        """Add the step's sums, of all processes; they must all call this."""
        if self._step_sums is None:
            return
        if processes.count() > 1:  # on the device, where the gradients have just been exchanged
            dist.all_reduce(self._step_sums)
        found, self._step_sums = self._step_sums, None
        self._sums = found if self._sums is None else self._sums.to(found) + found

    def means(self) -> dict[str, float]:
        """Return each loss's mean over the batches since this was last called; without factors."""
        *totals, batches = self.sums or [0.0]
        self._sums = None
        return {name: total / batches for name, total in zip(self._losses, totals, strict=False)}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is changed here and by no optimizer, for checkpoints; may be written to."""
        return {} if self._bias is None else self._bias.tensors()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside `tensors`, as transformers asks for it."""
        return {"args": {}, "attributes": {"sums": self.sums}}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Sum up the step and move the routers' biases."""
        self._settle()
        if self._bias is not None:
            self._bias.step()


def check_losses(spec: LossSpec | None, layers: Sequence[MoeLayer], family: str) -> None:
    """Check losses against a model's configuration, before its weights are loaded.

    Args:
        spec: the recipe's section.
        layers: of the model, which may be on the meta device.
        family: the model's type, for messages.

    Raises:
        ModelError, RecipeError: as `RouterLosses`.
    """
    if spec is not None and spec.acts:
        RouterLosses(spec, layers, family)


def make_losses(
    spec: LossSpec | None, layers: Sequence[MoeLayer], family: str, reporter: Reporter = SILENT
) -> RouterLosses | None:
    """Return the losses that a recipe asks for, None if all are 0; warn where routers are frozen.

    Args:
        spec: the recipe's section.
        layers: of the model, found before PEFT wraps it; by now it is clear what trains.
        family: the model's type, for messages.
        reporter: told the warning.

    Raises:
        ModelError, RecipeError: as `RouterLosses`, or a bias would be moved in a frozen router.
    """
    if spec is None or not spec.acts:
        return None
    losses = RouterLosses(spec, layers, family)
    frozen = [layer for layer in layers if not _trains(layer)]
    if frozen and spec.bias_update:
        raise RecipeError(
            "losses.bias_update: moves the routers' biases, but the routers are frozen; set "
            "train: {router: true} or method: full, or losses.bias_update: 0"
        )
    if frozen:
        reporter.note(
            f"warning: {', '.join(spec.coefficients())}: the routers are frozen, so these losses "
            f"act only through the hidden states that earlier trained layers make, and not at all "
            f"on a layer with nothing trained before it; train: {{router: true}} or method: full "
            f"trains the routers"
        )
    return losses


def silence_own_losses(model: nn.Module, reporter: Reporter = SILENT) -> None:
    """Turn off losses of routers that a model would add to its task's loss by itself.

    transformers adds `router_aux_loss_coef` times its own load balance loss where a checkpoint's
    config has `output_router_logits: true`; the code that DeepSeek's checkpoints bring adds one
    wherever `aux_loss_alpha` is not 0, as it is. A run's losses are the recipe's.

    Args:
        model: changed in place: its config in memory, and what such routers took from it.
        reporter: told about a loss that was on.
    """
    config = text_config(model)
    for each in {id(each): each for each in (model.config, config)}.values():
        if getattr(each, "output_router_logits", None):
            each.output_router_logits = False  # type: ignore[union-attr]
            reporter.note(
                "the config of this checkpoint has output_router_logits: true: its own loss of "
                "routers is turned off; set losses.load_balance in the recipe to have one"
            )
    routers = [m for m in model.modules() if isinstance(getattr(m, "alpha", None), float)]
    if getattr(config, "aux_loss_alpha", 0) and routers:
        for router in routers:
            router.alpha = 0.0  # type: ignore[assignment]
        reporter.note(
            f"the code of this checkpoint adds a loss of its own to its routers' (aux_loss_alpha "
            f"{config.aux_loss_alpha}): it is turned off; set losses.sequence_balance in the "
            f"recipe to have one"
        )


def device_groups(
    devices: int | Sequence[Sequence[int]] | None, layer: MoeLayer
) -> list[list[int]]:
    """Return which experts of a layer are on each device.

    Args:
        devices: how many devices, each with as many experts in a row; or the ids of each one.
        layer: whose experts.

    Raises:
        RecipeError: not every expert is on exactly one device.
    """
    E = layer.num_experts
    if isinstance(devices, int):
        if E % devices:
            raise RecipeError(
                f"losses.devices: {E} experts of {layer.name} cannot be put on {devices} devices "
                f"in equal parts; give the ids of each device's experts"
            )
        each = E // devices
        return [list(range(first, first + each)) for first in range(0, E, each)]
    groups = [list(group) for group in devices or ()]
    ids = sorted(expert for group in groups for expert in group)
    if ids != list(range(E)) or not all(groups):
        raise RecipeError(
            f"losses.devices: each of the {E} experts of {layer.name}, 0 to {E - 1}, must be on "
            f"exactly one device, and no device without experts (got {groups})"
        )
    return groups


def _losses(spec: LossSpec) -> dict[str, _Loss]:
    def even(loss: Callable[..., Tensor], x: RouterPass, row_T: Tensor) -> Tensor:
        return loss(x.affinity, x.index, counted_T=row_T >= 0)

    def device_balance(x: RouterPass, row_T: Tensor) -> Tensor:
        groups = device_groups(spec.devices, x.layer)
        return balance.device_balance(x.affinity, x.index, groups, row_T >= 0)

    return {
        "load_balance": partial(even, balance.load_balance),
        "expert_balance": partial(even, balance.expert_balance),
        "device_balance": device_balance,
        "sequence_balance": lambda x, row_T: balance.sequence_balance(
            x.affinity, row_T, x.layer.top_k
        ),
        "importance": lambda x, row_T: balance.importance(
            x.weight, x.index, x.layer.num_experts, row_T >= 0
        ),
        "router_z": lambda x, row_T: balance.router_z(x.logits, row_T >= 0),
    }


def _trains(layer: MoeLayer) -> bool:
    return layer.router is not None and any(p.requires_grad for p in layer.router.parameters())

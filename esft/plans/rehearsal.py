"""A run without its weights: the model is prepared, takes a step, and is profiled."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esft.locating import first_line
from esft.methods import Method, make_method
from esft.moe import moe_layers, trainable_parameters
from esft.plans.batch import Batch
from esft.plans.contents import known
from esft.plans.counts import Chosen
from esft.plans.fake_model import fake_model
from esft.plans.few_bits import store_frozen
from esft.plans.optimizers import make_optimizer, optimizer_name, state_bytes
from esft.plans.passes import ask, peak, score
from esft.plans.passes import read as read_texts
from esft.plans.pretence import Tracker, pretending
from esft.plans.scored import Scored
from esft.recipe_sections import Recipe
from esft.run.labelled import labelled_logits
from esft.run.recomputation import KEY, recompute_layers


@dataclass(frozen=True)
class Rehearsed:
    """What a run takes, in bytes but for the last.

    Attributes:
        frozen: weights and buffers that do not train.
        trained: weights that do, in the dtype that they train in.
        gradients: of these.
        optimizer: its state.
        saved: what a forward pass keeps for the backward pass.
        loading: the most while the model is made ready to train.
        training: the most at one time while training; None where the model's code asks for the
            content of tensors.
        profiling: the same while experts are scored; 0 where they are not.
        evaluation: the same while rows are scored; 0 where they are not.
        shapes: of the parameters that train.
        adapter: whether what trains is an adapter and not weights of the base.
        flops: floating-point operations of one optimizer step; None as `training`.
        obstacle: why these are None.
    """

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    saved: int | None
    loading: int
    training: int | None
    profiling: int | None
    evaluation: int | None
    shapes: tuple[torch.Size, ...]
    adapter: bool
    flops: int | None
    obstacle: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers train."""
        return sum(shape.numel() for shape in self.shapes)


def rehearse(
    recipe: Recipe,
    config: Any,
    dtype: torch.dtype,
    chosen: Chosen,
    batch: Batch,
    *,
    width: int,
    device: str = "cpu",
    profiled: tuple[int, int] | None = None,
) -> Rehearsed:
    """Go through a run on tensors without content.

    Args:
        recipe: of the run, `training` section with or without defaults.
        config: of the model.
        dtype: that weights are loaded in.
        chosen: the experts that train.
        batch: what each step sees.
        width: bytes of a parameter in the checkpoint.
        device: `cpu` or `cuda`, which the run is to be on.
        profiled: rows and tokens of each that the experts are scored on at once; None for none.

    Raises:
        RecipeError, ModelError, SelectionError: as training would.
    """
    with pretending() as tracker, known(chosen.routed, device):
        model = fake_model(config, dtype, tracker, chosen.routed)
        method = planned_method(recipe, chosen, model, width)
        tracker.reset()
        read = 0
        if kinds := recipe.frozen.kinds:
            read = store_frozen(model, kinds, method.trained_parts)
        prepared = method.prepare(model)
        # Few bits are made as the weights are read, and of the model as it was nothing is there.
        loading = tracker.live + read if kinds else tracker.peak
        named = trainable_parameters(prepared)
        parameters = list(named.values())
        trained = sum(parameter.nbytes for parameter in parameters)
        if recipe.training.get("gradient_checkpointing"):
            recompute_layers(prepared, recipe.training.get(KEY))
        fixed = tracker.live
        name = optimizer_name(recipe.training)
        shapes = tuple(parameter.shape for parameter in parameters)
        state = state_bytes(name, shapes, parameters[0].dtype.itemsize)
        saved = training = profiling = evaluation = flops = obstacle = None
        try:
            step = _Step(recipe, prepared, parameters, batch, tracker)
            optimizer = make_optimizer(name, parameters)
            step.take(state if optimizer is None else optimizer)
            saved, training, flops = step.saved, step.peak, step.flops
            # In between, the optimizer's state is there, and no gradient.
            model.eval()
            profiling = (
                0 if profiled is None else peak(tracker, lambda: read_texts(model, *profiled))
            )
            evaluation = _evaluate(prepared, batch.scored, tracker)
        except Exception as error:  # a family's own code, on tensors that it did not expect
            obstacle = first_line(error)
    return Rehearsed(
        frozen=fixed - trained,
        trained=trained,
        gradients=trained,
        optimizer=state,
        saved=saved,
        loading=loading,
        training=training,
        profiling=profiling,
        evaluation=evaluation,
        shapes=shapes,
        adapter=method.adapter is not None,
        flops=flops,
        obstacle=obstacle,
    )


def planned_method(recipe: Recipe, chosen: Chosen, model: Any, width: int) -> Method:
    """Return the method of a recipe, with the experts that are planned for.

    Args:
        recipe: of the run.
        chosen: the experts.
        model: with nothing attached.
        width: bytes of a parameter in the checkpoint.
    """
    if not recipe.matches_esft:
        return make_method(recipe, chosen.selection)
    assert chosen.selection is not None  # the recipe has a rule for the delta to be matched
    sizes = {
        layer.index: sum(shape[1:].numel() for shape in layer.layout.shapes().values())
        for layer in moe_layers(model)
    }
    experts = chosen.selection.experts
    matched = sum(width * sizes[layer] * len(ids) for layer, ids in experts.items())
    return make_method(recipe, None, match_bytes=matched)


class _Step:
    """A later optimizer step of a run, as transformers' Trainer and `EsftTrainer` take it."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        parameters: list[nn.Parameter],
        batch: Batch,
        tracker: Tracker,
    ) -> None:
        self.training, self.model, self.parameters = recipe.training, model, parameters
        self.batch, self.tracker = batch, tracker
        self.saved = self.peak = self.flops = 0

    def take(self, optimizer: torch.optim.Optimizer | int) -> None:
        """Take it.

        Args:
            optimizer: or the bytes of its state, where it cannot be had.
        """
        self.model.train()
        self._give_gradients()
        # Not the first step: the optimizer's state is there.
        state = self._update(optimizer)
        if self.batch.accumulated > 1:  # nor the first of its batches: so are the gradients
            self._give_gradients()
        self.tracker.reset()
        self._pass()
        if norm := self.training.get("max_grad_norm", 1.0):
            torch.nn.utils.clip_grad_norm_(self.parameters, norm)
        if state is None:
            self._update(optimizer)
        self.flops = self.tracker.flops * self.batch.accumulated
        self.peak = self.tracker.peak
        del state

    def _give_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    def _update(self, optimizer: torch.optim.Optimizer | int) -> Tensor | None:
        if isinstance(optimizer, int):
            state = torch.empty(optimizer, dtype=torch.uint8)
        else:
            state = None
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return state

    def _pass(self) -> None:
        before = self.tracker.live
        inputs = planned_inputs(self.batch)
        with ExitStack() as stack:
            stack.enter_context(autocast(self.training, "cpu"))
            with self.tracker.finding(self.batch.labelled):
                given = stack.enter_context(labelled_logits(self.model, inputs))
            loss = self.model(**given, **self._items())["loss"]
        self.saved = self.tracker.live - before
        loss.backward()

    def _items(self) -> dict[str, Tensor]:
        """Return what Trainer gives to a model that can divide its loss by it."""
        options = inspect.signature(self.model.forward).parameters.values()
        takes = any(option.kind is option.VAR_KEYWORD for option in options)
        return {"num_items_in_batch": torch.ones((), dtype=torch.int64)} if takes else {}


def planned_inputs(batch: Batch) -> dict[str, Any]:
    """Return a batch as `esft.data.packing.collate` makes it."""
    shape = batch.rows, batch.length
    place = "position_ids" if batch.packed else "attention_mask"
    names = ("input_ids", "labels", place)
    return {name: torch.ones(shape, dtype=torch.int64) for name in names} | {"use_cache": False}


def _evaluate(model: Any, scored: Scored | None, tracker: Tracker) -> int:
    """Return the most memory while rows are scored, 0 if there are none."""
    if scored is None:
        return 0
    most = peak(tracker, lambda: score(model, scored.rows, scored.length, scored.kept))
    if (asked := scored.asked) is None:
        return most
    return max(most, peak(tracker, lambda: ask(model, *asked)))


@contextmanager
def autocast(training: Mapping[str, Any], device: str) -> Iterator[None]:
    """Compute in the narrower dtype that a recipe's `training` section asks for, if any."""
    if not (training.get("bf16") or training.get("fp16")):
        yield
        return
    narrow = torch.bfloat16 if training.get("bf16") else torch.float16
    with torch.autocast(device, dtype=narrow):
        yield

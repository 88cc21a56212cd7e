"""A few real steps of the model, or of its first layers, and the speed of the whole run at that."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from esft.data.example import IGNORED
from esft.errors import EsftError
from esft.loading import auto_class
from esft.locating import trusted
from esft.moe import moe_layers, text_config, trainable_parameters
from esft.plans.batch import Batch
from esft.plans.counts import Chosen
from esft.plans.optimizers import make_optimizer, optimizer_name
from esft.plans.records import Probe
from esft.plans.rehearsal import autocast, planned_inputs, planned_method, rehearse
from esft.recipe_sections import Recipe
from esft.run.labelled import labelled_logits
from esft.run.recomputation import KEY, recompute_layers
from esft.selection import Selection

_TIMED = 3
_WARM_UP = 1


def take_probe(
    recipe: Recipe,
    skeleton: Any,
    chosen: Chosen,
    batch: Batch,
    *,
    device: str,
    dtype: torch.dtype,
    width: int,
    flops: int,
    peak: int,
) -> Probe:
    """Take real steps on random weights, and say how long the run would take at that speed.

    The whole model takes them if it fits into half of the memory that is free here; else the
    layers up to the first with routed experts, and the time of the rest follows from the
    operations.

    Args:
        recipe: of the run.
        skeleton: the model on the meta device.
        chosen: the experts that train.
        batch: what each step sees; one of it is taken.
        device: where: `cpu` or `cuda`.
        dtype: that weights are loaded in.
        width: bytes of a parameter in the checkpoint.
        flops: of an optimizer step of the whole model.
        peak: of memory, of the whole model.

    Raises:
        EsftError: the device is not here, or not even these layers fit.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EsftError("--probe: takes steps on this machine, which has no GPU; plan for its cpu")
    free = _free(device) // 2
    layers = of_layers = text_config(skeleton).num_hidden_layers
    config = skeleton.config
    one = replace(batch, accumulated=1)
    if peak > free:
        layers = moe_layers(skeleton)[0].index + 1
        config, chosen = _first_layers(config, layers), _within(chosen, layers)
    found = rehearse(recipe, config, dtype, chosen, one, width=width)
    if found.training is None or found.flops is None:
        raise EsftError(f"--probe: {found.obstacle}")
    if found.training > free:
        raise EsftError(
            f"--probe: {layers} layers alone take {found.training / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB may be used here (half of what is free)"
        )
    seconds = _time(recipe, config, chosen, one, device=device, dtype=dtype, width=width)
    speed = found.flops / seconds
    step = flops / speed
    return Probe(
        layers=layers,
        of_layers=of_layers,
        seconds=seconds,
        flops_per_second=speed,
        step_seconds=step,
        total_seconds=None if batch.steps is None else batch.steps * step,
        tokens_per_second=batch.tokens / step,
    )


def _time(
    recipe: Recipe,
    config: Any,
    chosen: Chosen,
    batch: Batch,
    *,
    device: str,
    dtype: torch.dtype,
    width: int,
) -> float:
    """Return the median seconds of a step."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trusted.get())
        prepared = planned_method(recipe, chosen, model, width).prepare(model)
        parameters = list(trainable_parameters(prepared).values())
        if recipe.training.get("gradient_checkpointing"):
            recompute_layers(prepared, recipe.training.get(KEY))
        optimizer = make_optimizer(optimizer_name(recipe.training), parameters)
        optimizer = optimizer or torch.optim.AdamW(parameters, fused=True)
        inputs = _real_inputs(batch, text_config(model).vocab_size)
    prepared.train()
    times = []
    for _ in range(_WARM_UP + _TIMED):
        start = time.perf_counter()
        with labelled_logits(prepared, inputs) as given, autocast(recipe.training, device):
            loss = prepared(**given)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for a GPU
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])


def _real_inputs(batch: Batch, vocabulary: int) -> dict[str, Any]:
    inputs = planned_inputs(batch)
    shape = batch.rows, batch.length
    inputs["input_ids"] = torch.randint(vocabulary, shape)
    labels = inputs["input_ids"].clone().flatten()
    # The first token of each row is not predicted; the others have labels as far as there are any.
    each = -(-batch.labelled // batch.rows)
    places = torch.arange(batch.length).repeat(batch.rows)
    labels[(places == 0) | (places > each)] = IGNORED
    inputs["labels"] = labels.view(shape)
    if "position_ids" in inputs:
        inputs["position_ids"] = torch.arange(batch.length).repeat(batch.rows, 1)
    return inputs


def _first_layers(config: Any, layers: int) -> Any:
    """Return the configuration of the same model with its first layers only."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    whole = text.num_hidden_layers
    text.num_hidden_layers = layers
    for name, value in vars(text).items():  # a kind for each layer, as `layer_types`
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    return shorter


def _within(chosen: Chosen, layers: int) -> Chosen:
    if chosen.selection is None:
        return chosen
    experts = {layer: ids for layer, ids in chosen.selection.experts.items() if layer < layers}
    return Chosen(Selection(experts) if experts else chosen.selection, chosen.routed)


def _free(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil  # type: ignore[import-untyped]  # of accelerate

    return int(psutil.virtual_memory().available)

"""Switch experts off and see what it costs: are the best experts of a task hard to replace?

DeepSeekMoE (arXiv 2401.06066, section 4.5) disables the top routed experts and measures the loss:
the more it rises, the less redundant the experts are. docs/mask.md says what is the same here and
what is not.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esft.data.bad_rows import STRICT, BadRows
from esft.data.encode import encode_rows
from esft.data.example import Example
from esft.data.rows import read_rows
from esft.data.sources import Source
from esft.errors import DataError, EsftError, ModelError, SelectionError
from esft.evaluation import Evaluation, evaluate_model
from esft.inference import load
from esft.layer_scores import METRICS
from esft.loading import load_skeleton
from esft.moe import MoeLayer, moe_layers
from esft.profiling import profile_model
from esft.progress import SILENT, Reporter
from esft.ranking import draw
from esft.scores import Scores
from esft.selection import select
from esft.selection_rule import make_rule

DRAWS = 5


@dataclass(frozen=True)
class Masking:
    """What switching experts off did.

    Attributes:
        top: how many experts of each layer were off.
        metric: by which scores the best ones were the best.
        whole: the model as it is.
        best: without the `top` best experts of each layer.
        random: without as many drawn at random, once for each seed.
    """

    top: int
    metric: str
    whole: Evaluation
    best: Evaluation
    random: list[Evaluation]

    @property
    def random_loss(self) -> float:
        """Mean loss over the draws, in nats an answer token."""
        return statistics.fmean(found.loss for found in self.random)

    @property
    def random_spread(self) -> float | None:
        """Standard deviation of the loss over the draws; None where there is one draw only."""
        losses = [found.loss for found in self.random]
        return statistics.stdev(losses) if len(losses) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "top": self.top,
            "metric": self.metric,
            "whole": self.whole.to_dict(),
            "best": self.best.to_dict(),
            "random": [found.to_dict() for found in self.random],
            "random_loss": self.random_loss,
            "random_spread": self.random_spread,
        }


def mask(
    model: str | Path,
    data: str | Path | Source,
    *,
    top: int,
    scores: Scores | str | Path | None = None,
    metric: str = METRICS[0],
    draws: int = DRAWS,
    seed: int = 0,
    delta: str | Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = 4096,
    max_rows: int | None = None,
    bad_rows: BadRows = STRICT,
    reporter: Reporter = SILENT,
) -> Masking:
    """Score a model on a test set without its best experts, and without random ones.

    Args:
        model: a checkpoint's folder, a hub id, or `tiny-moe`.
        data: a test set, see `esft.data.rows.read_rows`; held out, if `scores` come from others.
        top: how many experts of each layer are switched off.
        scores: which experts are the best; None scores them on `data` itself.
        metric: `token` or `gate`.
        draws: how many times random experts are switched off instead.
        seed: of the first draw, see `esft.ranking.draw`; each next one has the next seed.
        delta: folder of a delta made from this model.
        device: `cpu`, `cuda:0`, ...; None picks a GPU if there is one.
        dtype: see `esft.loading.pick_dtype`.
        batch_tokens: see `esft.evaluation.evaluate_model`.
        max_rows: score only the first rows of the set.
        bad_rows: collects rows that cannot be used, if any may be skipped.
        reporter: shows progress.

    Raises:
        DataError: a row cannot be used; the message names file and line.
        ModelError: the model cannot be loaded, or its routers cannot be kept from experts.
        SelectionError: the scores cannot be read or are of another model, or `top` leaves a token
            fewer experts than it uses.
        DeltaError: the delta is damaged.
        CheckError: the delta was made from another base.
    """
    if max_rows is not None and max_rows < 1:
        raise DataError(f"--max-rows {max_rows}: expected at least 1")
    # Loading weights may take minutes: what can fail before it, fails before it.
    _check_options(metric, top, draws)
    rows = read_rows(data, bad_rows=bad_rows, reporter=reporter)[:max_rows]
    if isinstance(scores, str | Path):
        scores = Scores.read(scores)
    _check(moe_layers(load_skeleton(model)), scores, top)
    loaded, tokenizer = load(model, delta=delta, device=device, dtype=dtype)
    examples = encode_rows(rows, tokenizer, check_end=False, bad_rows=bad_rows, reporter=reporter)
    return mask_model(
        loaded,
        examples,
        scores or profile_model(loaded, examples, reporter=reporter),
        top=top,
        metric=metric,
        draws=draws,
        seed=seed,
        batch_tokens=batch_tokens,
        reporter=reporter,
    )


def mask_model(
    model: Any,
    examples: Sequence[Example],
    scores: Scores,
    *,
    top: int,
    metric: str = METRICS[0],
    draws: int = DRAWS,
    seed: int = 0,
    batch_tokens: int = 4096,
    reporter: Reporter = SILENT,
) -> Masking:
    """Do what `mask` does with a model in memory, which is left as it was.

    Raises:
        ModelError: as `mask`.
        SelectionError: as `mask`.
        EsftError: `top` or `draws` is not positive.
    """
    _check_options(metric, top, draws)
    layers = {layer.index: layer for layer in moe_layers(model)}
    _check(list(layers.values()), scores, top)
    best = select(scores, metric=metric, top_n=top)

    def score(off: Mapping[int, list[int]]) -> Evaluation:
        with masked(model, off):
            return evaluate_model(model, examples, batch_tokens=batch_tokens, reporter=reporter)

    drawn = [
        {
            index: draw(seed + number, index, layers[index].num_experts, top)
            for index in best.experts
        }
        for number in range(draws)
    ]
    return Masking(
        top=top,
        metric=metric,
        whole=score({}),
        best=score(best.experts),
        random=[score(off) for off in drawn],
    )


@contextmanager
def masked(model: nn.Module, off: Mapping[int, list[int]]) -> Iterator[None]:
    """Keep a model's routers from choosing some experts while the block runs.

    Every router chooses its K experts by `topk` of scores. Inside a layer with routed experts, the
    scores of those that are off are minus infinity when `topk` sees them, so that the best K of
    the others are chosen. What the router makes of the scores of those it chose is its own.

    Args:
        model: with routed experts.
        off: by layer index, the ids of the experts to switch off.

    Raises:
        ModelError: a router chose an expert that was off: it does not choose by `topk`.
    """
    layers = [layer for layer in moe_layers(model) if off.get(layer.index)]
    mode = _Masked()
    with ExitStack() as stack:
        for layer in layers:
            mode.watch(layer, torch.tensor(off[layer.index]), stack)
        stack.enter_context(mode)
        yield


class _Masked(TorchFunctionMode):
    """Hides experts from `topk` while a layer with routed experts runs."""

    def __init__(self) -> None:
        super().__init__()
        self._inside: list[tuple[MoeLayer, Tensor]] = []

    def watch(self, layer: MoeLayer, ids: Tensor, stack: ExitStack) -> None:
        """Hide the experts `ids` of a layer while it runs, until the stack is closed."""

        def enter(_module: nn.Module, _args: Any) -> None:
            self._inside.append((layer, ids))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._inside.pop()

        def check(index: Tensor, _weight: Tensor) -> None:
            _check_choice(layer, index, ids)

        block = layer.layout.block
        stack.callback(block.register_forward_pre_hook(enter).remove)
        stack.callback(block.register_forward_hook(leave, always_call=True).remove)
        stack.callback(layer.layout.observe(check).remove)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk) and self._inside and args:
            args = (_hidden(args[0], *self._inside[-1]), *args[1:])
        return func(*args, **kwargs)


def _hidden(scores: Tensor, layer: MoeLayer, ids: Tensor) -> Tensor:
    """Return scores with those of the experts `ids` at minus infinity, if they are of experts.

    Scores of all experts are `[..., E]`, or `[..., G, E / G]` where groups of experts are scored
    first; a router that may choose none of them has columns of its own behind them.
    """
    size = scores.shape[-1]
    grouped = scores.dim() > 2 and scores.shape[-2] * size == layer.num_experts
    beyond = layer.layout.others and size > layer.num_experts
    if not (size == layer.num_experts or grouped or beyond):
        return scores
    off = torch.zeros(max(size, layer.num_experts), dtype=torch.bool)
    off[ids] = True
    shape = scores.shape[-2:] if grouped else scores.shape[-1:]
    return scores.masked_fill(off.view(shape).to(scores.device), -torch.inf)


def _check_choice(layer: MoeLayer, index: Tensor, ids: Tensor) -> None:
    if torch.isin(index, ids.to(index.device)).any():
        raise ModelError(
            f"{layer.name}: its router chose an expert that is switched off: it does not choose "
            f"by topk alone, or too few experts are left; this family cannot be masked"
        )


def _check_options(metric: str, top: int, draws: int) -> None:
    make_rule(metric=metric)
    for option, value in (("--top", top), ("--draws", draws)):
        if value < 1:
            raise EsftError(f"{option} {value}: expected at least 1")


def _check(layers: Sequence[MoeLayer], scores: Scores | None, top: int) -> None:
    """Refuse scores of another model, and to leave a token fewer experts than it uses."""
    for layer in layers:
        left = layer.num_experts - layer.top_k
        if top > left:
            raise SelectionError(
                f"--top {top}: layer {layer.index} has {layer.num_experts} experts and a token "
                f"uses {layer.top_k}; at most {left} can be switched off"
            )
    here = {layer.index: layer.num_experts for layer in layers}
    there = {index: layer.experts for index, layer in scores.layers.items()} if scores else {}
    for index, experts in there.items():
        if here.get(index) != experts:
            has = f"{here[index]} experts" if index in here else "no routed experts"
            raise SelectionError(
                f"the scores are of another model: they have {experts} experts in layer {index} "
                f"and this one has {has} there"
            )

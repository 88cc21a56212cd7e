"""What a model needs when it does not train: to be profiled, scored and asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from esft.locating import first_line
from esft.moe import MoeLayer, moe_layers, text_config
from esft.plans.contents import known
from esft.plans.fake_model import fake_model
from esft.plans.parameters import largest_layer
from esft.plans.passes import ask, peak, read, score
from esft.plans.pretence import pretending
from esft.streaming.available import WEIGHTS_SHARE

_ON_THEIR_WAY = 2  # experts that are fetched because they are needed, beside the caches


@dataclass(frozen=True)
class Inference:
    """Bytes on the device, for a model that does not train.

    Attributes:
        weights: of the whole model.
        experts: of these, the routed experts'.
        profiling: the most while `esft profile` scores the experts of the model in memory.
        streaming: the same one layer at a time: two layers, the hidden states, and what the
            computing layer needs beside them.
        hidden: of this, the hidden states of the sample; `--stream` keeps them in a file beyond
            a budget.
        evaluation: the most while `esft eval` scores rows.
        generation: the most while `esft generate` answers.
        cache: of this, the keys and values of a text of that length.
        least: the least `--expert-memory`, experts as they are loaded.
        recommended: one by which the experts of the last token stay, in every layer.
        obstacle: why what is None is not known.
    """

    weights: int
    experts: int
    profiling: int | None
    streaming: int | None
    hidden: int
    evaluation: int | None
    generation: int | None
    cache: int | None
    least: int
    recommended: int
    obstacle: str | None

    @property
    def generation_least(self) -> int | None:
        """The most while answering with the least `--expert-memory`."""
        return self._offloaded(self.least)

    @property
    def generation_recommended(self) -> int | None:
        """The same with the recommended one."""
        return self._offloaded(self.recommended)

    def streams(self, free: int) -> bool:
        """Whether `esft profile` would go through the model one layer at a time.

        Args:
            free: bytes of the device; see `esft.streaming.available.too_large`.
        """
        return self.weights > WEIGHTS_SHARE * free

    def _offloaded(self, experts: int) -> int | None:
        return None if self.generation is None else self.generation - self.experts + experts

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self) | {
            "generation_least": self.generation_least,
            "generation_recommended": self.generation_recommended,
        }


@dataclass(frozen=True)
class Texts:
    """What a model is given when it does not train.

    Attributes:
        profiled: rows and tokens of each that experts are scored on at once.
        sample: tokens of the whole sample.
        scored: rows and tokens of each that `esft eval` scores at once.
        asked: tokens of a prompt and its answer.
    """

    profiled: tuple[int, int]
    sample: int
    scored: tuple[int, int]
    asked: int


def rehearse_inference(
    config: Any, dtype: torch.dtype, texts: Texts, device: str = "cpu"
) -> Inference:
    """Have a model without content read and answer.

    Args:
        config: of the model.
        dtype: that weights are loaded in.
        texts: what it is given.
        device: `cpu` or `cuda`, which it is to be on.
    """
    with pretending() as tracker, known(0.0, device):
        model = fake_model(config, dtype, tracker).requires_grad_(False).eval()
        weights, layers = tracker.live, moe_layers(model)
        obstacle = profiling = evaluation = generation = cache = None
        try:
            profiling = peak(tracker, lambda: read(model, *texts.profiled))
            evaluation = peak(tracker, lambda: score(model, *texts.scored, texts.scored[1]))
            pasts: list[Any] = []
            generation = peak(tracker, lambda: pasts.append(ask(model, 1, texts.asked)))
            cache = tracker.live - weights
        except Exception as error:  # a family's own code, on tensors that it did not expect
            obstacle = first_line(error)
        width = dtype.itemsize
        hidden = texts.sample * text_config(model).hidden_size * width
        two_layers = 2 * largest_layer(model, width)
        each, top_k = max(map(_expert, layers)) * width, max(layer.top_k for layer in layers)
        # One token's experts in every layer, the guessed ones of one, and those on their way; see
        # `esft.offload.split`.
        usual = top_k * len(layers) + (top_k + 1) // 2 + _ON_THEIR_WAY
        experts = sum(layer.num_experts * _expert(layer) for layer in layers) * width
        return Inference(
            weights=weights,
            experts=experts,
            profiling=profiling,
            streaming=None if profiling is None else profiling - weights + two_layers + hidden,
            hidden=hidden,
            evaluation=evaluation,
            generation=generation,
            cache=cache,
            least=each * top_k,
            recommended=min(each * usual, experts),
            obstacle=obstacle,
        )


def _expert(layer: MoeLayer) -> int:
    """Return the parameters of one of a layer's experts."""
    return sum(shape[1:].numel() for shape in layer.layout.shapes().values())

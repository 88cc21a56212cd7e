"""Routing drift: how much the routers' use of the selected experts changed by training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.data.encode import Example
from esft.errors import EsftError
from esft.profiling import profile_model
from esft.progress import SILENT, Reporter
from esft.run.folder import ROUTING_AFTER, ROUTING_BEFORE
from esft.scores import Scores
from esft.selection import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the selection's sample, which is drawn in random order, the first: profiled twice, they take
# about as long as training on two thirds as many tokens.
TOKENS = 16_384


@dataclass(frozen=True)
class ExpertDrift:
    """One expert's AGS as a share of its layer's, before training and after."""

    layer: int
    expert: int
    before: float
    after: float


@dataclass(frozen=True)
class Drift:
    """How the selected experts' average gate scores (AGS) changed on the same sample.

    Scores are shares: divided by the sum of their layer's.

    Attributes:
        tokens: of the sample.
        seconds: that profiling it twice took.
        before: mean over the layers of the selected experts' sum before training.
        after: the same after it.
        mean: mean absolute change of a selected expert's score.
        largest: the expert whose score changed most.
    """

    tokens: int
    seconds: float
    before: float
    after: float
    mean: float
    largest: ExpertDrift

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return asdict(self)


class DriftMeter:
    """Profiles a model before training and, on the same sample, after it.

    Args:
        model: before training; it may have the selection attached.
        sample: at most `TOKENS` tokens are worth the time.
        count: which tokens count, see `esft.profile`.
        before: the model's scores on this very sample, if they are known; saves half the time.
        reporter: shown the progress.

    Attributes:
        before: the scores before training.

    Raises:
        DataError: no token of the sample counts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sample: Sequence[Example],
        *,
        count: str = "all",
        before: Scores | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        self._model, self._sample = model, sample
        self._count, self._reporter = count, reporter
        self._seconds = 0.0
        self.before = before or self._profile()

    def read(self, selection: Selection, out: Path | None = None) -> Drift:
        """Profile the model, now trained, and compare.

        Args:
            selection: the experts that trained.
            out: a folder that gets the scores before and after, as files of their own.

        Raises:
            EsftError: nothing is selected.
            OutputError: the files cannot be written.
        """
        after = self._profile()
        if out is not None:
            self.before.write(out / ROUTING_BEFORE)
            after.write(out / ROUTING_AFTER)
        return compare(self.before, after, selection, seconds=round(self._seconds, 3))

    def _profile(self) -> Scores:
        start = time.monotonic()
        found = profile_model(self._model, self._sample, count=self._count, reporter=self._reporter)
        self._seconds += time.monotonic() - start
        return found


def compare(before: Scores, after: Scores, selection: Selection, *, seconds: float = 0.0) -> Drift:
    """Compare the scores of two models on the same sample.

    Args:
        before: of the model before training.
        after: of the same model after it.
        selection: the experts that trained.
        seconds: what is said of the cost.

    Raises:
        EsftError: nothing is selected.
    """
    layers = {layer: ids for layer, ids in selection.experts.items() if ids}
    if not layers:
        raise EsftError("no expert is selected whose scores could be compared")
    experts = [
        ExpertDrift(layer, expert, _share(before, layer)[expert], _share(after, layer)[expert])
        for layer, ids in layers.items()
        for expert in ids
    ]
    return Drift(
        tokens=before.sample["tokens"],
        seconds=seconds,
        before=sum(expert.before for expert in experts) / len(layers),
        after=sum(expert.after for expert in experts) / len(layers),
        mean=sum(abs(expert.after - expert.before) for expert in experts) / len(experts),
        largest=max(experts, key=lambda expert: abs(expert.after - expert.before)),
    )


def _share(scores: Scores, layer: int) -> list[float]:
    gate = scores.layers[layer].gate
    return [value / sum(gate) for value in gate]

"""The base that a run starts from: loaded as it is, or with its frozen weights in few bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esft import processes
from esft.errors import ModelError
from esft.loading import load_model
from esft.progress import SILENT, Reporter
from esft.quantising.checkpoint import load_quantised
from esft.quantising.stored import StoredWeight, stored_weights
from esft.recipe_sections import Recipe
from esft.report import numerals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.methods import Method
    from esft.run.choice import Sampler
    from esft.scores import Scores


class BaseModel:
    """A run's base, in memory once: its own weights where those are asked for, then what trains.

    Args:
        recipe: of the run.
        folder: of the checkpoint.
        device: see `esft.loading.pick_device`.
        check: refuses a model that this run cannot train; called once, with the first one that
            can run.
        reporter: told what few bits save.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        device: str | None,
        check: Callable[[PreTrainedModel], None],
        reporter: Reporter = SILENT,
    ) -> None:
        self._recipe, self._folder, self._device = recipe, folder, device
        self._check, self._reporter = check, reporter
        self._exact: PreTrainedModel | None = None
        self._checked = False

    def exact(self) -> PreTrainedModel:
        """Return the model with its own weights, all of them in memory."""
        if self._exact is None:
            self._exact = load_model(self._folder, device=self._device, dtype=self._recipe.dtype)
            self._check_once(self._exact)
        return self._exact

    def scores(self, sampler: Sampler) -> Scores:
        """Profile the base with its own weights, never all of them in memory if few bits will do.

        Raises:
            ModelError: the family cannot be profiled, or the checkpoint is damaged.
        """
        if self._recipe.frozen.kinds:
            try:
                return sampler.profile_streamed(
                    self._folder, device=self._device, dtype=self._recipe.dtype
                )
            except ModelError as error:
                if processes.count() > 1:  # the others may be streaming on
                    raise
                self._reporter.note(f"{error}; all weights are loaded to profile this model")
        return sampler.profile(self.exact(), self._folder)

    def to_train(self, method: Method) -> PreTrainedModel:
        """Return the model for the method to prepare; what `exact` returned is not used any more.

        Where frozen experts are in few bits, it cannot run before that.
        """
        kinds = self._recipe.frozen.kinds
        if not kinds:
            return self.exact()
        self._exact = None  # both need not fit
        gc.collect()
        parts, dtype = method.trained_parts, self._recipe.dtype
        return load_quantised(self._folder, kinds, parts, device=self._device, dtype=dtype)

    def prepared(self, model: nn.Module) -> None:
        """Check the model that the method has prepared, if its base could not be, and tell of it.

        Args:
            model: it can run now.
        """
        self._check_once(model)
        if weights := stored_weights(model).values():
            small = sum(weight.nbytes for weight in weights)
            whole = sum(weight.whole_nbytes for weight in weights)
            sizes = f"{numerals.size(whole)} of frozen weights take {numerals.size(small)}"
            self._reporter.note(f"frozen_dtype: {sizes}")
            # Alike in all processes from the start; else they are sent around before each step.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model,
                [
                    f"{path}.{name}"
                    for path, module in model.named_modules()
                    if isinstance(module, StoredWeight)
                    for name, _ in module.named_buffers()
                ],
            )

    def _check_once(self, model: Any) -> None:
        if not self._checked:
            self._check(model)
            self._checked = True

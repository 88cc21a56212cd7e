"""LoRA on the selected experts alone: low-rank factors of their matrices, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.changes import check_changes, expert_changes
from esft.errors import DeltaError
from esft.experts import attach
from esft.fingerprint import Fingerprint
from esft.loading import DTYPES
from esft.low_rank import add_low_rank, disk_factors
from esft.low_rank_delta import write_low_rank_delta
from esft.methods.base import Method
from esft.moe import trainable_parameters
from esft.tensors import TORCH

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from esft.recipe_sections import LoraSpec
    from esft.selection import Selection


class HotLoraMethod(Method):
    """Train low-rank factors (arXiv 2106.09685) of the experts of a selection.

    PEFT adapts a stack of experts as a whole; here each selected expert has factors of its own.

    Args:
        selection: which experts; its flags for other parts are not followed.
        spec: rank and alpha.
        param_dtype: of the factors, `float32` or `bfloat16`.
    """

    name = "hot-lora"

    def __init__(
        self, selection: Selection, spec: LoraSpec, *, param_dtype: str = "float32"
    ) -> None:
        self.selection = selection
        self.rank, self.alpha = spec.rank, spec.scaled_alpha(spec.rank)
        self.param_dtype = DTYPES[param_dtype]
        self._adapter: dict[str, int] | None = None

    @property
    def adapter(self) -> dict[str, int] | None:
        """See `Method.adapter`."""
        return self._adapter

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Attach the selection, frozen, and factors to it. See `esft.low_rank.add_low_rank`."""
        attach(
            model,
            self.selection,
            shared_experts=False,
            non_expert_modules=False,
            router=False,
            param_dtype=None,
        )
        add_low_rank(model, r=self.rank, alpha=self.alpha, dtype=self.param_dtype)
        trained = trainable_parameters(model).values()
        size = sum(p.numel() * p.element_size() for p in trained)
        self._adapter = {"r": self.rank, "alpha": self.alpha, "bytes": size}
        return model

    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Look up in the base each tensor that factors change.

        Raises:
            DeltaError: see `Method.check`; or the model was loaded in a narrower dtype than its
                base's, so that factors would be added to other values there.
        """
        changes = expert_changes(model, base)
        check_changes(changes, base)
        for change in changes:
            stored = TORCH[base[change.name]["dtype"]]
            if change.value.dtype.itemsize < stored.itemsize:
                raise DeltaError(
                    f"tensor {change.name} is {stored} in the base, and {change.value.dtype} in "
                    f"the model; set dtype: checkpoint to train factors of the base's own values"
                )

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write the factors, and the hashes of what they come to."""
        write_low_rank_delta(
            folder,
            base,
            expert_changes(model, base),
            list(disk_factors(model, base)),
            about,
            r=self.rank,
            alpha=self.alpha,
        )

"""LoRA through PEFT, on every linear layer and on all routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esft.delta import write_manifest
from esft.errors import DeltaError, ModelError, RecipeError
from esft.files import explain_write_errors
from esft.methods.base import Method, parameters
from esft.moe import moe_layers
from esft.shards import Checkpoint

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from esft.recipe import LoraSpec


class LoraMethod(Method):
    """Train low-rank adapters (arXiv 2106.09685); PEFT keeps one pair for all experts of a stack.

    Args:
        spec: rank, alpha and targets.
    """

    name = "lora"

    def __init__(self, spec: LoraSpec) -> None:
        self._spec = spec

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Wrap the model in PEFT's adapters.

        Raises:
            RecipeError: PEFT finds none of the targets, or refuses them.
        """
        from peft import LoraConfig, get_peft_model

        targets = self._spec.target_parameters
        if targets is None:
            targets = [
                f"{layer.name}.{name}"
                for layer in moe_layers(model)
                for name, weight in layer.experts.named_parameters(recurse=False)
                if weight.dim() == 3
            ]
        config = LoraConfig(
            r=self._spec.r,
            lora_alpha=self._spec.alpha,
            target_modules=self._spec.target_modules,
            target_parameters=targets,
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config)
        except (ValueError, NotImplementedError) as error:
            raise RecipeError(f"lora: PEFT refuses: {error}") from error

    def save(
        self, model: nn.Module, folder: Path, base: Checkpoint, about: Mapping[str, Any]
    ) -> None:
        """Write PEFT's adapter files and the manifest that ties them to their base."""
        for name, parameter in parameters(model).items():
            if not parameter.isfinite().all():
                raise DeltaError(f"tensor {name} has NaN or infinite values; training diverged")
        with explain_write_errors(folder):
            model.save_pretrained(folder)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, all placeholders
        write_manifest(folder, base, about)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load a PEFT adapter and add it to the model's weights, in place.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: this adapter does not fit: {error}") from error
    return merged

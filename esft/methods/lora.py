"""LoRA through PEFT: by default on every linear layer but the routers, and on all experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esft.errors import DeltaError, RecipeError, nearest
from esft.files import explain_write_errors
from esft.fingerprint import Fingerprint
from esft.manifest import write_manifest
from esft.methods.base import Method
from esft.moe import moe_layers, trainable_parameters
from esft.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from esft.recipe_sections import LoraSpec


ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output's
_EXPERTS_ONCE = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class LoraMethod(Method):
    """Train low-rank adapters (arXiv 2106.09685); PEFT keeps one pair for all experts of a stack.

    Args:
        spec: rank, alpha and targets.
        match_bytes: choose the rank whose factors have about so many bytes; None takes the spec's.
        reporter: told of a rank that was chosen.
    """

    name = "lora"

    def __init__(
        self, spec: LoraSpec, *, match_bytes: int | None = None, reporter: Reporter = SILENT
    ) -> None:
        self._spec, self._match_bytes, self._reporter = spec, match_bytes, reporter
        self._adapter: dict[str, int] | None = None

    @property
    def adapter(self) -> dict[str, int] | None:
        """See `Method.adapter`."""
        return self._adapter

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Wrap the model in PEFT's adapters.

        Raises:
            RecipeError: PEFT finds none of the targets, or refuses them.
        """
        rank, wanted = self._spec.rank, self._match_bytes
        if wanted is not None:
            # Every factor is as large as the rank is high: an adapter of rank 1 tells the rest.
            rank = max(1, round(wanted / _adapter_bytes(self._wrap(_outline(model), 1))))
        wrapped = self._wrap(model, rank)
        size = _adapter_bytes(wrapped)
        self._adapter = {"r": rank, "alpha": self._spec.scaled_alpha(rank), "bytes": size}
        if wanted is not None:
            self._adapter["esft_bytes"] = wanted
            self._reporter.note(
                f"lora.match: rank {rank}: an adapter of {size:,} bytes, where ESFT's delta would "
                f"have {wanted:,}"
            )
        return wrapped

    def _wrap(self, model: PreTrainedModel, rank: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        spec = self._spec
        _check_names("target_modules", spec.target_modules, model.named_modules())
        _check_names("target_parameters", spec.target_parameters, model.named_parameters())
        modules, parameters = spec.target_modules, spec.target_parameters
        if modules == ALL_LINEAR:
            modules, renamed = _linear_layers(model)
            parameters = [*(_experts(model) if parameters is None else parameters), *renamed]
        elif parameters is None:
            parameters = _experts(model)
        config = LoraConfig(
            r=rank,
            lora_alpha=spec.scaled_alpha(rank),
            target_modules=modules,
            target_parameters=parameters,
            task_type="CAUSAL_LM",
        )
        try:
            return get_peft_model(model, config)
        except (ValueError, NotImplementedError) as error:
            raise RecipeError(f"lora: PEFT refuses: {str(error).splitlines()[0]}") from error

    def check(self, model: nn.Module, base: Fingerprint) -> None:
        """Nothing to look up: an adapter is saved as PEFT's own files."""

    def save(
        self, model: nn.Module, folder: Path, base: Fingerprint, about: Mapping[str, Any]
    ) -> None:
        """Write PEFT's adapter files and the manifest that ties them to their base."""
        for name, parameter in trainable_parameters(model).items():
            if not parameter.isfinite().all():
                raise DeltaError(f"tensor {name} has NaN or infinite values; training diverged")
        with explain_write_errors(folder):
            model.save_pretrained(folder)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, all placeholders
        write_manifest(folder, base, about)


def _outline(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model's modules and shapes without weights, in its dtype."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).to(model.dtype)


def _adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of what trains, which PEFT saves in the dtype that it trains in."""
    return sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())


def _linear_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Name every linear layer but the output and the routers: as modules, or by their weights.

    PEFT takes the names in `_EXPERTS_ONCE` for experts of an older transformers, whatever layer
    they name, and would train stacks and routers instead; a weight's own name it leaves alone.
    """
    routers = [layer.router for layer in moe_layers(model) if layer.router is not None]
    others = [module for router in routers for module in router.modules()]
    others.append(model.get_output_embeddings())
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(module is other for other in others)
    ]
    renamed = [name for name in names if name.rpartition(".")[2] in _EXPERTS_ONCE]
    kept = [name for name in names if name not in renamed]
    return kept, [f"{name}.weight" for name in renamed]


def _experts(model: PreTrainedModel) -> list[str]:
    """Name the stacked weights of all routed experts."""
    return [
        f"{layer.name}.{name}"
        for layer in moe_layers(model)
        for name, weight in layer.experts.named_parameters(recurse=False)
        if weight.dim() == 3
    ]


def _check_names(
    key: str, targets: str | list[str] | None, named: Iterable[tuple[str, object]]
) -> None:
    """Refuse a target that matches nothing; PEFT does so only if none of them does."""
    if not isinstance(targets, list):  # a pattern, or ours
        return
    names = [name for name, _ in named]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = nearest(target, {name.rpartition(".")[2] for name in names})
            raise RecipeError(f"lora.{key}: nothing in this model is called {target}{hint}")

"""The sections of a recipe: which keys there are, of which types, and what they default to."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from esft.recipe_text import to_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SelectionSpec(_Strict):
    """Which experts to train: the options of `esft profile` and `esft select`."""

    metric: Literal["token", "gate"] | None = None
    p: float | None = None
    mass: Literal["share", "raw"] | None = None
    round: int | None = None
    preset: str | None = None
    top_n: int | None = None
    budget: str | int | None = None
    layers: str | int | None = None
    random: int | None = None
    tokens: int = Field(default=131_072, gt=0)
    seq_len: int = Field(default=4096, gt=0)
    count: Literal["all", "prompt", "completion"] = "all"
    seed: int = 0

    def rule(self) -> dict[str, Any]:
        """Return the keyword arguments of `esft.select` that are set."""
        sample = {"tokens", "seq_len", "count", "seed"}
        return self.model_dump(exclude=sample, exclude_none=True)


class DataSpec(_Strict):
    """Task sets, and what of them is learnt."""

    train: str
    eval: str | None = None
    loss_on: Literal["completion", "all"] = "completion"
    max_length: int = Field(default=1024, gt=1)
    packing: bool = True


class LoraSpec(_Strict):
    """PEFT's LoRA. By default on every linear layer and on all routed experts."""

    r: int = Field(default=8, gt=0)
    alpha: int = Field(default=16, gt=0)
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None


class Recipe(_Strict):
    """A whole run; what is None is chosen when it is trained, see docs/train.md."""

    model: str
    method: Literal["esft", "random", "lora", "full"] = "esft"
    selection: str | SelectionSpec | None = None
    data: DataSpec
    training: dict[str, Any] = Field(default_factory=dict)
    lora: LoraSpec | None = None
    dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None

    @property
    def trains_experts(self) -> bool:
        """Whether the method trains a selection of experts."""
        return self.method in ("esft", "random")

    def to_yaml(self) -> str:
        """Return the recipe as YAML; reading it gives an equal recipe."""
        return to_yaml(self.model_dump(exclude_none=True))

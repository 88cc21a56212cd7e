"""The sections of a recipe: which keys there are, of which types, and what they default to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from esft.data.formats import FormatOrAuto
from esft.data.mixture import StoppingStrategy
from esft.measures.metric import MetricName
from esft.recipe_text import to_yaml


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# Of a loss: 0 turns it off, and it costs nothing then.
_Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SelectionSpec(_Strict):
    """Which experts to train: the options of `esft profile` and `esft select`."""

    metric: Literal["token", "gate"] | None = None
    p: float | Literal["auto"] | None = None
    cover: float | None = None
    mass: Literal["share", "raw"] | None = None
    round: int | None = None
    preset: str | None = None
    top_n: int | None = None
    budget: str | int | None = None
    group: int | None = None
    layers: str | int | None = None
    random: int | None = None
    random_from: Literal["all", "unselected"] | None = None
    tokens: int = Field(default=131_072, gt=0)
    seq_len: int = Field(default=4096, gt=0)
    count: Literal["all", "prompt", "completion"] = "all"
    seed: int = 0

    def rule(self) -> dict[str, Any]:
        """Return the keyword arguments of `esft.select` that are set."""
        sample = {"tokens", "seq_len", "count", "seed"}
        return self.model_dump(exclude=sample, exclude_none=True)


class TrainSpec(_Strict):
    """What trains, as in the ablation of arXiv 2407.01906; the parts are `esft.trained_parts`.

    A part that is None does what the flags of the selection's file say.
    """

    experts: Literal["selection", "all", "none"] = "selection"
    shared_experts: bool | None = None
    non_expert_modules: bool | None = None
    router: bool | None = None

    @property
    def parts(self) -> dict[str, bool | None]:
        """The parts beside the routed experts, as `esft.attach` takes them."""
        return self.model_dump(exclude={"experts"})


class SourceSpec(_Strict):
    """A file, a folder of files, or a data set of the hub; see `esft.data.sources.Source`."""

    path: str
    format: FormatOrAuto | None = None
    split: str | None = None
    config: str | None = None
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)


Sources = str | SourceSpec | Annotated[list[str | SourceSpec], Field(min_length=1)]


class DataSpec(_Strict):
    """Task sets, and what of them is learnt."""

    train: Sources
    eval: Sources | None = None
    eval_rows: int | None = Field(default=None, gt=0)
    test: Sources | None = None
    format: FormatOrAuto = "auto"
    stopping_strategy: StoppingStrategy = "first_exhausted"
    seed: int = 0
    skip_bad: int = Field(default=0, ge=0)
    loss_on: Literal["completion", "assistant", "all"] = "completion"
    last_turn_only: bool = False
    append_eos: bool = False
    max_length: int = Field(default=1024, gt=1, le=2**24)
    truncation: Literal["drop", "error", "keep_end", "split"] = "drop"
    packing: bool = True

    def sources(self, which: Literal["train", "eval", "test"]) -> list[SourceSpec]:
        """Return the sources of a task set, each with its format; none if there is no such set."""
        given = getattr(self, which)
        listed = given if isinstance(given, list) else [] if given is None else [given]
        specs = [SourceSpec(path=item) if isinstance(item, str) else item for item in listed]
        return [spec.model_copy(update={"format": spec.format or self.format}) for spec in specs]


class EvaluationSpec(_Strict):
    """What a run is scored by, while it trains and once it has.

    Attributes:
        metrics: of the rows of `data.eval` and `data.test`; the first is the task's score.
        max_new_tokens: an answer's at most, where a metric needs it as text.
        general: rows of other domains, whose loss tells what was forgotten: a folder of files,
            each a domain of that name, or domains by name.
        max_rows: score only the first rows of `data.eval`, and of `data.test`.
        general_max_rows: score only the first rows of each domain.
        allow_code: whether code that the model writes may be run, in a sandbox: `pass_at_1`.
        code_seconds: that one answer's code and its tests may take.
    """

    metrics: Annotated[list[MetricName], Field(min_length=1)] = ["exact_match"]
    max_new_tokens: int = Field(default=64, gt=0)
    general: str | dict[str, str | SourceSpec] | None = None
    max_rows: int | None = Field(default=None, gt=0)
    general_max_rows: int | None = Field(default=None, gt=0)
    allow_code: bool = False
    code_seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)


class LoraSpec(_Strict):
    """LoRA: rank and alpha as in arXiv 2407.01906 by default.

    Attributes:
        r: rank; 8 where neither it nor `match` is given.
        alpha: products are multiplied by alpha / r; 2 r unless given.
        match: `esft` chooses the rank whose adapter has about the bytes of the delta that ESFT by
            the recipe's selection would have. Of method `lora`.
        target_modules: of method `lora`, as PEFT's; by default every linear layer but the routers.
        target_parameters: likewise; by default the stacks of all routed experts.
    """

    r: int | None = Field(default=None, gt=0)
    alpha: int | None = Field(default=None, gt=0)
    match: Literal["esft"] | None = None
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None

    @property
    def rank(self) -> int:
        """The rank where it is not matched."""
        return self.r or 8

    def scaled_alpha(self, rank: int) -> int:
        """Return alpha for a rank."""
        return self.alpha or 2 * rank


# How a block of a frozen weight is stored, see docs/frozen-dtype.md.
_Stored = Literal["int8", "nf4"]


class FrozenSpec(_Strict):
    """In how many bits frozen weights are kept while others train; see docs/frozen-dtype.md.

    Attributes:
        experts: the routed experts that are not selected; their biases stay.
        linear: every other linear layer (attention, dense feed-forward networks, shared experts)
            but the routers and the output head.
        embeddings: the input embeddings and the output head, tied or not.
    """

    experts: _Stored | None = None
    linear: _Stored | None = None
    embeddings: _Stored | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each part that is quantised."""
        return self.model_dump(exclude_none=True)


class LossSpec(_Strict):
    """Losses of routers, each by its coefficient; see docs/losses.md. 0 is off."""

    load_balance: _Coefficient = 0.0
    expert_balance: _Coefficient = 0.0
    device_balance: _Coefficient = 0.0
    devices: int | list[list[int]] | None = None
    sequence_balance: _Coefficient = 0.0
    importance: _Coefficient = 0.0
    router_z: _Coefficient = 0.0
    bias_update: _Coefficient = 0.0

    def coefficients(self) -> dict[str, float]:
        """Return the losses that are on, by name, without the bias update."""
        found = self.model_dump(exclude={"devices", "bias_update"})
        return {name: value for name, value in found.items() if value}

    @property
    def acts(self) -> bool:
        """Whether anything is on."""
        return bool(self.coefficients() or self.bias_update)


class CheckpointSpec(_Strict):
    """Which checkpoints are kept; `training.save_strategy` says when one is written."""

    keep_last: int = Field(default=2, gt=0)
    keep_best: int = Field(default=0, ge=0)


class EarlyStoppingSpec(_Strict):
    """When to stop before the last step: `patience` evaluations in a row without a gain."""

    patience: int = Field(default=1, gt=0)
    threshold: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Recipe(_Strict):
    """A whole run; what is None is chosen when it is trained, see docs/train.md."""

    model: str
    method: Literal["esft", "random", "lora", "hot-lora", "full"] = "esft"
    selection: str | SelectionSpec | None = None
    data: DataSpec
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    train: TrainSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    lora: LoraSpec | None = None
    losses: LossSpec | None = None
    dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    frozen_dtype: _Stored | FrozenSpec | None = None
    device: str | None = None
    checkpoints: CheckpointSpec = Field(default_factory=CheckpointSpec)
    deterministic: bool = False
    early_stopping: EarlyStoppingSpec | None = None
    routing_drift: bool = True

    @property
    def trains_experts(self) -> bool:
        """Whether the method trains experts, and parts beside them, as `train` says."""
        return self.method in ("esft", "random")

    @property
    def selects_experts(self) -> bool:
        """Whether it is a selection of the experts that trains, not all or none of them."""
        if self.method == "hot-lora":
            return True
        return self.trains_experts and (self.train or TrainSpec()).experts == "selection"

    @property
    def matches_esft(self) -> bool:
        """Whether a selection is made only to know how large its delta would be."""
        return self.method == "lora" and self.lora is not None and self.lora.match is not None

    @property
    def frozen(self) -> FrozenSpec:
        """What of the frozen weights is quantised, by part; a single word leaves embeddings."""
        if isinstance(self.frozen_dtype, str):
            return FrozenSpec(experts=self.frozen_dtype, linear=self.frozen_dtype)
        return self.frozen_dtype or FrozenSpec()

    def to_yaml(self) -> str:
        """Return the recipe as YAML; reading it gives an equal recipe."""
        return to_yaml(self.model_dump(exclude_none=True))

"""A callback for transformers' Trainer and TRL's trainers: what they train, saved as a delta."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from esft.changes import check_changes, check_start, trained_changes
from esft.delta import write_delta
from esft.errors import CheckError, ModelError, RecipeError
from esft.experts import (
    attached_layers,
    attached_parts,
    attached_selection,
    is_shared,
    part_parameters,
)
from esft.files import new_folder, refuse_existing, write_text
from esft.fingerprint import Fingerprint, fingerprint, tokenizer_digest
from esft.loading import refuse_quantised
from esft.locating import resolve
from esft.moe import text_config, trainable_parameters
from esft.report.base_card import CARD, BaseCard, describe_base
from esft.report.saved_card import saved_card
from esft.run.exact_parameters import restore_exactly, save_exactly, token_of
from esft.secrets import redact
from esft.shards import open_checkpoint

DELTA = "delta"  # in a checkpoint's folder
_SECRET = re.compile(r"(^|_)(token|secret|password|key|credentials?)$", re.IGNORECASE)


@dataclass(frozen=True)
class _Base:
    """What is known of the base before training, so that saving needs nothing of it afterwards."""

    name: str
    tensors: Fingerprint
    tokenizer: str | None
    card: BaseCard


class SaveDelta(TrainerCallback, ExportableState):
    """Save what a Trainer changed in a model with a selection attached, as a delta.

    Give it to `transformers.Trainer` or one of TRL's trainers as one of `callbacks`. Before
    training it checks that the model, the optimizer and the base fit together; at the end the
    delta appears in `folder`, complete or not at all. It also makes two things right that the
    Trainer does not know how to: resuming from a checkpoint, and `load_best_model_at_end`.

    Args:
        folder: where the delta goes; must not exist, or be empty, when training begins.
        base: the checkpoint that the model was loaded from: a folder, a hub id, `tiny-moe`. None
            takes it from the model, which knows what it was loaded from.
        every_save: write a delta into every checkpoint of the Trainer's, too: `checkpoint-N/delta`.

    Raises (from the Trainer's constructor and its `train`):
        ModelError: no selection is attached, something else trains too, PEFT wraps the model, the
            optimizer holds other parameters, or the base cannot be found or is quantised.
        RecipeError: an argument of the Trainer cannot work here.
        CheckError: the model was not loaded from the base, or the checkpoint that training goes on
            from was not saved by this callback.
        DeltaError: what trains has no place in the base; after training: it is not finite.
        OutputError: `folder` exists, or the disk is full.
    """

    def __init__(
        self, folder: str | Path, base: str | Path | None = None, *, every_save: bool = False
    ) -> None:
        self.folder = Path(folder)
        self.base = base
        self.every_save = every_save
        self._found: _Base | None = None
        self._token = ""

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into a checkpoint of this callback: a token for it."""
        self._token = secrets.token_hex(16)
        arguments = {
            "folder": str(self.folder),
            "base": None if self.base is None else str(self.base),
            "every_save": self.every_save,
        }
        return {"args": arguments, "attributes": {"_token": self._token}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Check the model and read the base; before a long preparation of data, say."""
        self._prepare(args, options["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Check what could not be before, and go on from a checkpoint if the Trainer does."""
        model = options["model"]
        if self._found is None:  # added to a Trainer that was there
            self._prepare(args, model)
        refuse_existing(self.folder)
        _check_trainable(model)
        _check_optimizer(options.get("optimizer"), model)
        if state.global_step > 0:
            restore_exactly(_resumed_from(args, state), model)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Put beside a checkpoint what it lacks."""
        if not state.is_world_process_zero:
            return
        checkpoint = _checkpoint(args, state)
        save_exactly(checkpoint, options["model"], self._token)
        if self.every_save:
            self._write(checkpoint / DELTA, args, state, options["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the delta."""
        model = options["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            restore_exactly(Path(state.best_model_checkpoint), model)
        if state.is_world_process_zero:
            self._write(self.folder, args, state, model)

    def _prepare(self, args: TrainingArguments, model: Any) -> None:
        _check_arguments(args)
        if getattr(model, "peft_config", None) is not None:
            raise ModelError(
                "PEFT wraps this model and has frozen the selected experts; leave out peft_config, "
                "or train the adapter without a selection"
            )
        if is_shared(model):
            raise ModelError(
                "processes share this model's experts (DistributedConfig), and the Trainer clips "
                "gradients by the norm of its own process's; train in a loop of your own with "
                "esft.gradients.clip_gradients and esft.saving.save_delta (docs/scaling.md)"
            )
        _check_trainable(model)
        _warn_of_balance_loss(args, model)
        name = self.base or getattr(model.config, "_name_or_path", "")
        if not name:
            raise ModelError("SaveDelta(base=...): the model does not know what it was loaded from")
        folder = resolve(name)
        refuse_quantised(folder)
        checkpoint = open_checkpoint(folder)
        base = fingerprint(checkpoint)
        changes = trained_changes(model, base)
        check_changes(changes, base)
        check_start(changes, checkpoint)
        card = describe_base(str(name), folder, type(model).__name__)
        self._found = _Base(str(name), base, tokenizer_digest(folder), card)

    def _write(
        self, folder: Path, args: TrainingArguments, state: TrainerState, model: Any
    ) -> None:
        assert self._found is not None
        selection = attached_selection(model)
        drawn = selection is not None and selection.rule.get("random") is not None
        about: dict[str, Any] = {
            "method": "random" if drawn else "esft",
            "base": {
                "name": self._found.name,
                "model_type": text_config(model).model_type,
                "architecture": type(model).__name__,
                "tokenizer": self._found.tokenizer,
            },
            "training": {
                "steps": state.global_step,
                "beside_the_selection": list(attached_parts(model).names),
                "arguments": stated_arguments(args),
            },
        }
        if selection is not None:
            about["selection"] = selection.to_dict()
        with new_folder(folder, replace=folder != self.folder) as temporary:
            changes = trained_changes(model, self._found.tensors)
            write_delta(temporary, self._found.tensors, changes, about)
            card = saved_card(about, selection, self._found.card)
            write_text(temporary / CARD, card)


def stated_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that are not their class's defaults, JSON-ready, without secrets."""
    values = args.to_dict()
    stated = {}
    for field in dataclasses.fields(args):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name in values and getattr(args, field.name) != default:
            stated[field.name] = values[field.name]
    return json.loads(json.dumps(_without_secrets(stated), default=str))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if not _SECRET.search(str(key))}
        return {key: _without_secrets(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _check_arguments(args: Any) -> None:
    """Refuse what would train or compare something else than it seems to."""
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise RecipeError(f"{name}: a delta is not put together from several processes yet")
    if getattr(args, "sync_ref_model", False):
        raise RecipeError(
            "sync_ref_model: TRL pairs the parameters of the model and its reference by their "
            "order, which is another one while a selection is attached; leave it out"
        )


def _check_trainable(model: nn.Module) -> None:
    """Check that what was attached trains, and nothing that the delta would not hold."""
    banks = [layer.banks for layer in attached_layers(model) if layer.banks.selected]
    attached = {id(parameter) for bank in banks for parameter in bank.trainable.values()}
    attached |= {id(parameter) for parameter in part_parameters(model).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in attached:
            raise ModelError(
                f"{name} trains, but esft.attach was not asked for it: the delta would lack it; "
                f"attach last, or set its requires_grad to False"
            )
        if not parameter.requires_grad and id(parameter) in attached:
            raise ModelError(f"{name} was attached to train, but is frozen")


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Check that an optimizer holds what trains, all of it and nothing else."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {id(parameter) for parameter in trainable_parameters(model).values()}
    if held != trained:
        raise ModelError(
            f"the optimizer holds {len(held - trained)} parameters that do not train and lacks "
            f"{len(trained - held)} that do; make it after esft.attach, from the parameters that "
            f"require a gradient"
        )


def _warn_of_balance_loss(args: Any, model: Any) -> None:
    if attached_parts(model).router:
        return
    config = text_config(model)
    asked = getattr(args, "router_aux_loss_coef", 0.0)  # of TRL's configurations, not Trainer's
    factor = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
    if factor and hasattr(config, "output_router_logits"):
        warnings.warn(
            f"router_aux_loss_coef is {factor} (TRL takes the model's own unless told): a loss "
            f"that balances the router trains the selected experts, while the router is frozen; "
            f"set router_aux_loss_coef=0.0",
            stacklevel=2,
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """Find the checkpoint that the Trainer goes on from: it tells callbacks its state, not where.

    Raises:
        CheckError: it was not saved with this callback, or lies elsewhere.
    """
    saved = (state.stateful_callbacks or {}).get(SaveDelta.__name__)
    last = saved[-1] if isinstance(saved, list) else saved
    token = ((last or {}).get("attributes") or {}).get("_token")
    if token is None:
        raise CheckError(
            f"step {state.global_step}: this checkpoint was saved without SaveDelta, and the "
            f"Trainer's own leave the selected experts at their initial weights; start again"
        )
    places = [_checkpoint(args, state)]
    if isinstance(args.resume_from_checkpoint, str):
        places.append(Path(args.resume_from_checkpoint))
    for place in places:
        if token_of(place) == token:
            return place
    raise CheckError(
        f"step {state.global_step}: the trained experts of this checkpoint are not in "
        f"{' or '.join(str(place) for place in places)}; move it there, or name it in the "
        f"training arguments (resume_from_checkpoint)"
    )

"""Models that two processes share through DistributedConfig, beside the same model in one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig

from esft.changes import Changed, trained_changes
from esft.data.example import Example
from esft.delta_callback import SaveDelta
from esft.errors import EsftError
from esft.experts import attach, attached_layers, detach
from esft.fingerprint import fingerprint
from esft.gradients import clip_gradients
from esft.low_rank import add_low_rank
from esft.merging import merge
from esft.moe import trainable_parameters
from esft.profiling import profile_model
from esft.saving import save_delta
from esft.selection import Selection
from esft.shards import open_checkpoint

EP = {"tp_size": 2, "ep_size": 2}
TP = {"tp_size": 2}
SPREAD = {1: [6, 1], 2: [7, 5]}  # of 8 experts; each process holds four
ONE_SIDED = {1: [0, 3], 2: [2, 1]}  # none of them is the second process's
STEPS = 5


def qwen_by_expert(folder: Path) -> Any:
    return _compare(folder, "qwen3_moe", EP, {0: [3, 0], **SPREAD})


def qwen_by_slice(folder: Path) -> Any:
    return _compare(folder, "qwen3_moe", TP, {0: [3, 0], **SPREAD})


def glm_with_shared_experts_and_router(folder: Path) -> Any:
    return _compare(folder, "glm4_moe", EP, ONE_SIDED, shared_experts=True, router=True)


def glm_by_slice(folder: Path) -> Any:
    return _compare(folder, "glm4_moe", TP, SPREAD, shared_experts=True, non_expert_modules=True)


# It has no plan for tensor parallelism, and transformers refuses an empty one.
GPT_OSS = {**EP, "tp_plan": {"model.norm": "replicate"}}


def gpt_oss(folder: Path) -> Any:
    return _compare(folder, "gpt_oss", GPT_OSS, {0: [3, 0], **SPREAD})


def experts_of_one_process_only(folder: Path) -> Any:
    return _compare(folder, "qwen3_moe", EP, ONE_SIDED)


def experts_without_tokens(folder: Path) -> Any:
    """Two tokens a step: most of the selected experts get none."""
    return _compare(folder, "qwen3_moe", EP, SPREAD, length=2)


def clipped_with_all_that_trains(folder: Path) -> Any:
    parts = {"shared_experts": True, "router": True, "non_expert_modules": True}
    return _compare(folder, "glm4_moe", EP, SPREAD, max_norm=0.05, **parts)


def half_precision(folder: Path) -> Any:
    """Weights in bf16, of which what trains does so in fp32: also what is sliced."""
    parts = {"shared_experts": True, "router": True, "non_expert_modules": True}
    return _compare(folder, "glm4_moe", EP, SPREAD, dtype=torch.bfloat16, **parts)


def attached_and_saved_whole(folder: Path) -> Any:
    """`save_pretrained` of a model with a selection attached: nothing of it is missing."""
    base = folder.parent / "qwen3_moe"
    attach(_load(base, EP), Selection(SPREAD)).save_pretrained(folder / "saved")
    dist.barrier()
    return _equal(folder / "saved", base)


def refused(folder: Path) -> Any:
    base = folder.parent / "qwen3_moe"
    said = []
    for config in ({"fsdp_size": 2}, {"fsdp_size": 2, "ep_size": 2}):
        try:
            attach(_load(base, config), Selection(SPREAD))
        except EsftError as error:
            said.append(str(error))
    shared = attach(_load(base, EP), Selection(SPREAD))
    saving = SaveDelta(folder / "delta", base)
    arguments = TrainingArguments(str(folder / "trainer"), use_cpu=True, report_to=[])
    for refuse in (
        lambda: saving.on_init_end(arguments, TrainerState(), TrainerControl(), model=shared),
        lambda: add_low_rank(shared, r=2, alpha=4.0),
    ):
        try:
            refuse()
        except EsftError as error:
            said.append(str(error))
    return said


def _compare(
    folder: Path,
    family: str,
    config: dict[str, Any],
    experts: dict[int, list[int]],
    *,
    length: int = 12,
    max_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
    **parts: bool,
) -> Any:
    """Profile, train and save a model twice: in the first process alone, then in both together."""
    base, selection = folder.parent / family, Selection(experts)
    found: dict[str, Any] = {}
    alone = _Run(_load(base, dtype=dtype)) if dist.get_rank() == 0 else None
    shared = _Run(_load(base, config, dtype))
    shared.start(selection, parts, base)
    shared.train(length, max_norm)
    save_delta(shared.model, folder / "delta", base)
    detach(shared.model).save_pretrained(folder / "detached")
    if alone is not None:
        alone.start(selection, parts, base)
        alone.train(length, max_norm)
        merge(base, folder / "delta", folder / "merged")
        saved = load_file(folder / "delta" / "esft_delta.safetensors")
        changes = trained_changes(alone.model, fingerprint(open_checkpoint(base)))
        found = {
            "scores": [run.scores.to_dict() for run in (alone, shared)],
            "logits": _far(alone.logits, shared.logits),
            "losses": [alone.losses, shared.losses],
            "norms": [alone.norms, shared.norms],
            "names": [sorted(change.name for change in changes), sorted(saved)],
            "starts": [run.starts for run in (alone, shared)],
            "weights": max(_far(change.value, saved[change.name]) for change in changes),
            "merged": _equal(folder / "detached", folder / "merged", dtype),
            "files": sorted(file.name for file in (folder / "delta").iterdir()),
        }
    return {**found, "held": shared.held, "losses_here": shared.losses, "norms_here": shared.norms}


class _Run:
    """One model: profiled, attached, trained by a plain loop."""

    def __init__(self, model: Any) -> None:
        self.model = model
        rows = [row.tolist() for batch in _batches(12) for row in batch]
        examples = [Example(row, [True] * len(row), "") for row in rows]
        self.scores = profile_model(model, examples, batch_tokens=30)

    def start(self, selection: Selection, parts: dict[str, bool], base: Path) -> None:
        attach(self.model, selection, **parts)
        with torch.no_grad():
            self.logits = self.model(input_ids=_batches(12)[0]).logits
        # Now: training changes the weights that these are views of.
        self.starts = _digest(trained_changes(self.model, fingerprint(open_checkpoint(base))))
        self.held = [
            [len(bank) for bank in layer.banks.trainable.values()]
            for layer in attached_layers(self.model)
        ]

    def train(self, length: int, max_norm: float | None) -> None:
        trained = list(trainable_parameters(self.model).values())
        # Not `foreach`: torch cannot take shared and whole parameters in one call.
        optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
        batches, self.losses, self.norms = _batches(length), [], []
        for step in range(STEPS):
            batch = batches[step % len(batches)]
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            if max_norm is not None:
                self.norms.append(clip_gradients(self.model, max_norm))
            optimizer.step()
            optimizer.zero_grad()
            self.losses.append(float(loss.detach()))


def _load(
    base: Path, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    options = {} if config is None else {"distributed_config": DistributedConfig(**config)}
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options).eval()


def _batches(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (2, length), generator=generator) for _ in range(4)]


def _far(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _digest(changes: list[Changed]) -> str:
    digest = hashlib.sha256()
    for change in changes:
        digest.update(f"{change.name} {change.rows} {list(change.value.shape)} ".encode())
        digest.update(change.value.numpy().tobytes())
    return digest.hexdigest()


def _equal(one: Path, other: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Whether two checkpoints have the same tensors, loaded in a dtype."""
    first, second = (
        {
            name: tensor
            for file in folder.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for folder in (one, other)
    )
    return first.keys() == second.keys() and all(
        torch.equal(first[n].to(dtype), second[n].to(dtype)) for n in first
    )

"""`esft.SaveDelta` on transformers' own Trainer: what it saves, refuses, and makes right."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import esft
from esft.delta_callback import SaveDelta, stated_arguments
from esft.errors import CheckError, DeltaError, ModelError, OutputError, RecipeError
from esft.experts import attach
from esft.moe import trainable_parameters
from esft.run.exact_parameters import restore_exactly
from esft.selection import Selection
from tests.deltas import load, save_base
from tests.training_loop import batches

PICKED = {1: [5, 0], 2: [3]}
SELECTION = Selection(PICKED, rule={"metric": "token", "p": 0.2})
SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bf16, so that what is trained in fp32 is rounded in the delta."""
    return save_base(tmp_path_factory.mktemp("base") / "tiny", "deepseek_v2")


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Every `train` collects garbage; what the libraries made of themselves is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run with checkpoints after two and four steps, its folder first."""
    folder = tmp_path_factory.mktemp("whole")
    work = trainer(base, folder / "out", [SaveDelta(folder / "delta", every_save=True)], **SAVING)
    work.train()
    return folder, work


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for batch in batches(8) for row in batch]


def trainer(
    base: Path,
    out: Path,
    callbacks: list[Any],
    model: PreTrainedModel | None = None,
    **changes: Any,
) -> Trainer:
    torch.manual_seed(0)
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    return Trainer(
        attach(load(base), SELECTION) if model is None else model,
        TrainingArguments(str(out), **arguments | changes),
        train_dataset=rows(),
        eval_dataset=rows()[:2],
        callbacks=callbacks,
    )


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainable_parameters(model).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def test_the_delta_merges_to_the_trained_model(base: Path, tmp_path: Path) -> None:
    work = trainer(base, tmp_path / "out", [esft.SaveDelta(tmp_path / "delta")])
    before = trained(work.model)
    work.train()
    after = trained(work.model)
    assert all((after[name] != before[name]).float().mean() > 0.5 for name in before)
    work.save_model(tmp_path / "saved")  # an ordinary checkpoint, whatever is attached
    merged = esft.merge(base, tmp_path / "delta", tmp_path / "merged")
    esft.verify(base, tmp_path / "delta", merged)
    assert_equal(weights(merged), weights(tmp_path / "saved"))
    for layer, experts in PICKED.items():
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts"
            exact = after[f"{name}.esft.trainable.{stack}"]
            assert exact.dtype == torch.float32
            assert torch.equal(weights(merged)[f"{name}.{stack}"][experts], exact.bfloat16())
    on_disk = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert {name for name in on_disk[0] if not torch.equal(on_disk[0][name], on_disk[1][name])} == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in PICKED.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }


def test_the_manifest_says_how_it_was_made(base: Path, tmp_path: Path) -> None:
    options = {"hub_token": "hf_abcdefghijklmnopqrst", "warmup_steps": 1, "learning_rate": 1e-2}
    work = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], max_steps=2, **options)
    work.train()
    text = (tmp_path / "delta" / "esft_config.json").read_text()
    assert "hf_abcdefghijklmnopqrst" not in text
    manifest = json.loads(text)
    assert manifest["method"] == "esft"
    assert manifest["base"]["name"] == str(base)
    assert manifest["base"]["architecture"] == "DeepseekV2ForCausalLM"
    assert manifest["selection"] == SELECTION.to_dict()
    assert manifest["training"]["steps"] == 2
    stated = manifest["training"]["arguments"]
    assert stated["learning_rate"] == 1e-2
    assert stated["warmup_steps"] == 1
    assert "weight_decay" not in stated  # as TrainingArguments has it
    assert not any("token" in key for key in stated)


def test_no_secret_is_stated_at_any_depth(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        hub_token="hf_secretsecretsecret",
        run_name="by hf_secretsecretsecret",
        optim_args="a=1",
        gradient_checkpointing_kwargs={"use_reentrant": False, "api_key": "secretsecret"},
        lr_scheduler_kwargs={"nested": [{"password": "secretsecret", "kept": 1}]},
    )
    stated = stated_arguments(arguments)
    assert "secretsecret" not in json.dumps(stated)
    assert stated["run_name"] == "by [hidden]"
    assert stated["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert stated["lr_scheduler_kwargs"] == {"nested": [{"kept": 1}]}


def test_a_random_selection_is_called_so(base: Path, tmp_path: Path) -> None:
    drawn = attach(load(base), Selection(PICKED, rule={"metric": "token", "random": 3}))
    trainer(base, tmp_path, [SaveDelta(tmp_path / "delta")], drawn, max_steps=1).train()
    manifest = json.loads((tmp_path / "delta" / "esft_config.json").read_text())
    assert manifest["method"] == "random"


def test_what_trains_beside_the_selection_is_saved_and_resumed(base: Path, tmp_path: Path) -> None:
    def beside() -> PreTrainedModel:
        return attach(load(base), SELECTION, shared_experts=True, router=True)

    whole = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], beside(), **SAVING)
    whole.train()
    whole.save_model(tmp_path / "saved")
    merged = esft.merge(base, tmp_path / "delta", tmp_path / "merged")
    assert_equal(weights(merged), weights(tmp_path / "saved"))
    before = weights(base)
    moved = {name for name, t in weights(merged).items() if not torch.equal(t, before[name])}
    for part in ("gate", "shared_experts.up_proj"):
        assert {f"model.layers.{layer}.mlp.{part}.weight" for layer in PICKED} <= moved
    manifest = json.loads((tmp_path / "delta" / "esft_config.json").read_text())
    assert manifest["training"]["beside_the_selection"] == ["shared_experts", "router"]

    again = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "again")], beside(), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(trained(again.model), trained(whole.model))


def test_the_optimizer_has_state_for_selected_experts_only(base: Path, tmp_path: Path) -> None:
    work = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], max_steps=1)
    work.train()
    expected = sum(p.numel() for p in trainable_parameters(work.model).values())
    assert expected == 3 * sum(map(len, PICKED.values())) * 32 * 24
    state = [t for s in work.optimizer.state.values() for t in s.values() if t.dim() > 0]
    assert sum(t.numel() for t in state) == 2 * expected


def test_a_callback_added_later_does_the_same(base: Path, tmp_path: Path) -> None:
    trainer(base, tmp_path, [SaveDelta(tmp_path / "first")], max_steps=2).train()
    later = trainer(base, tmp_path, [], max_steps=2)
    later.add_callback(SaveDelta(tmp_path / "second", base))
    later.train()
    names = [tmp_path / name / "esft_delta.safetensors" for name in ("first", "second")]
    assert_equal(load_file(names[0]), load_file(names[1]))


class Look(TrainerCallback):
    """Keeps what trains as it was when an event came, by event and step."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], dict[str, Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.seen["begin", state.global_step] = trained(kw["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.seen["save", state.global_step] = trained(kw["model"])


def test_stock_resume_leaves_the_experts_where_they_began(
    base: Path, whole: tuple[Path, Trainer], tmp_path: Path
) -> None:
    """Why the callback exists: transformers issue 48805, measured on attached models."""
    look = Look()
    again = trainer(base, tmp_path, [look], **SAVING)
    start = trained(again.model)
    again.train(resume_from_checkpoint=str(whole[0] / "out" / "checkpoint-2"))
    assert_equal(look.seen["begin", 2], start)
    assert any(not torch.equal(trained(again.model)[n], trained(whole[1].model)[n]) for n in start)


@pytest.mark.parametrize("moved", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(
    base: Path, whole: tuple[Path, Trainer], tmp_path: Path, moved: bool
) -> None:
    place = tmp_path / ("moved" if moved else "out/checkpoint-2")
    shutil.copytree(whole[0] / "out" / "checkpoint-2", place)
    again = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], **SAVING)
    if moved:
        again.args.resume_from_checkpoint = str(place)
    again.train(resume_from_checkpoint=again.args.resume_from_checkpoint or True)
    assert again.state.global_step == 4
    assert_equal(trained(again.model), trained(whole[1].model))
    files = [folder / "delta" / "esft_delta.safetensors" for folder in (whole[0], tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def refuses_to_resume(base: Path, out: Path, checkpoint: Path, message: str) -> None:
    work = trainer(base, out, [SaveDelta(out / "delta")], **SAVING)
    with pytest.raises(CheckError, match=message):
        work.train(resume_from_checkpoint=str(checkpoint))
    assert not (out / "delta").exists()


def test_a_checkpoint_that_was_saved_without_it_is_refused(
    base: Path, whole: tuple[Path, Trainer], tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint-2"
    shutil.copytree(whole[0] / "out" / "checkpoint-2", place)
    state = json.loads((place / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["SaveDelta"]
    (place / "trainer_state.json").write_text(json.dumps(state))
    refuses_to_resume(base, tmp_path, place, "step 2: .* saved without SaveDelta")


def test_experts_of_another_run_at_the_same_step_are_refused(
    base: Path, whole: tuple[Path, Trainer], tmp_path: Path
) -> None:
    other = trainer(base, tmp_path, [SaveDelta(tmp_path / "other")], **SAVING | {"max_steps": 2})
    other.train()
    # It is looked for where the Trainer would have written it: a callback is not told more.
    place = whole[0] / "out" / "checkpoint-2"
    refuses_to_resume(
        base, tmp_path, place, "step 2: .* of this checkpoint are not in .*/checkpoint-2; move"
    )


def test_a_damaged_checkpoint_is_refused(
    base: Path, whole: tuple[Path, Trainer], tmp_path: Path
) -> None:
    place = tmp_path / "checkpoint-2"
    shutil.copytree(whole[0] / "out" / "checkpoint-2", place)
    file = place / "esft" / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    refuses_to_resume(base, tmp_path, place, r"trained\.safetensors: damaged")


def test_a_checkpoint_of_another_selection_is_refused(
    base: Path, whole: tuple[Path, Trainer]
) -> None:
    other = attach(load(base), Selection({1: [5, 0, 2], 2: [3]}))
    before = trained(other)
    with pytest.raises(CheckError, match=r"layers\.1\..* is \(2, .* there, \(3, .* now"):
        restore_exactly(whole[0] / "out" / "checkpoint-2", other)
    assert_equal(trained(other), before)


def test_the_best_experts_are_loaded_at_the_end(base: Path, tmp_path: Path) -> None:
    """The stock `load_best_model_at_end` keeps the last ones."""
    look = Look()
    work = trainer(
        base,
        tmp_path / "out",
        [SaveDelta(tmp_path / "delta"), look],
        max_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,  # of other random tokens, so training makes it worse
    )
    work.train()
    assert work.state.best_model_checkpoint.endswith("checkpoint-1")
    first, last = look.seen["save", 1], look.seen["save", 2]
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert_equal(trained(work.model), first)
    work.save_model(tmp_path / "saved")
    merged = esft.merge(base, tmp_path / "delta", tmp_path / "merged")
    assert_equal(weights(merged), weights(tmp_path / "saved"))


def test_a_delta_with_every_save(base: Path, whole: tuple[Path, Trainer], tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoint = whole[0] / "out" / f"checkpoint-{step}"
        merged = esft.merge(base, checkpoint / "delta", tmp_path / f"merged-{step}")
        assert_equal(weights(merged), weights(checkpoint))
    assert_equal(
        load_file(whole[0] / "delta" / "esft_delta.safetensors"),
        load_file(checkpoint / "delta" / "esft_delta.safetensors"),
    )


def refused(
    base: Path, tmp_path: Path, error: type[Exception], message: str, **options: Any
) -> None:
    """Nothing of the kind may get as far as the first step, nor write a delta."""
    with pytest.raises(error, match=message):
        trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], **options)
    later = trainer(base, tmp_path / "out", [], **options)
    later.training_step = None  # would be called
    later.add_callback(SaveDelta(tmp_path / "delta"))
    with pytest.raises(error, match=message):
        later.train()
    assert not (tmp_path / "delta").exists()


def test_a_model_without_a_selection_is_refused(base: Path, tmp_path: Path) -> None:
    message = r"no selection is attached .* call esft\.attach"
    refused(base, tmp_path, ModelError, message, model=load(base))


def test_a_model_in_which_something_else_trains_is_refused(base: Path, tmp_path: Path) -> None:
    model = attach(load(base), SELECTION)
    model.lm_head.requires_grad_(True)
    message = r"lm_head\.weight trains, but esft\.attach was not asked for it"
    refused(base, tmp_path, ModelError, message, model=model)


def test_experts_that_were_frozen_again_are_refused(base: Path, tmp_path: Path) -> None:
    model = attach(load(base), SELECTION)
    next(iter(trainable_parameters(model).values())).requires_grad_(False)
    refused(base, tmp_path, ModelError, "was attached to train, but is frozen", model=model)


def test_a_model_wrapped_by_peft_is_refused(base: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(attach(load(base), SELECTION), LoraConfig(target_modules=["q_proj"]))
    message = "PEFT wraps this model .* leave out peft_config"
    refused(base, tmp_path, ModelError, message, model=wrapped)


def test_an_optimizer_made_before_attaching_is_refused(base: Path, tmp_path: Path) -> None:
    model = load(base)
    optimizer = torch.optim.AdamW(model.parameters())
    work = trainer(base, tmp_path, [SaveDelta(tmp_path / "delta")], attach(model, SELECTION))
    work.optimizer = optimizer
    message = r"the optimizer holds \d+ parameters that do not train and lacks 4 that do"
    with pytest.raises(ModelError, match=message):
        work.train()


def test_a_base_that_is_not_the_model_s_is_refused(base: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", "deepseek_v2", seed=1)
    with pytest.raises(CheckError, match="other: the model was not loaded from this base: tensor"):
        trainer(base, tmp_path, [SaveDelta(tmp_path / "delta", other)])
    family = save_base(tmp_path / "family", "mixtral")
    with pytest.raises(DeltaError, match="was trained but is not in the base"):
        trainer(base, tmp_path, [SaveDelta(tmp_path / "delta", family)])
    unknown = attach(load(base), SELECTION)
    unknown.config._name_or_path = ""
    with pytest.raises(ModelError, match=r"SaveDelta\(base=\.\.\.\): the model does not know"):
        trainer(base, tmp_path, [SaveDelta(tmp_path / "delta")], unknown)


def test_a_model_loaded_in_another_dtype_is_the_base_s(base: Path, tmp_path: Path) -> None:
    wide = save_base(tmp_path / "wide", "qwen3_moe")
    AutoModelForCausalLM.from_pretrained(wide, dtype="float32").save_pretrained(wide)
    for folder, dtype in ((base, "float32"), (wide, "bfloat16"), (wide, "float16")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        trainer(folder, tmp_path, [SaveDelta(tmp_path / "delta")], attach(model, SELECTION))


def test_a_folder_in_the_way_is_found_before_training(base: Path, tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "mine").touch()
    work = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")])
    with pytest.raises(OutputError, match="delta: the folder exists"):
        work.train()
    assert work.state.global_step == 0


def test_what_only_several_processes_could_do_is_refused(base: Path, tmp_path: Path) -> None:
    work = trainer(base, tmp_path, [])
    work.args.fsdp = "full_shard"
    work.add_callback(SaveDelta(tmp_path / "delta"))
    with pytest.raises(RecipeError, match="fsdp: a delta is not put together"):
        work.train()


def test_training_that_diverged_saves_nothing(base: Path, tmp_path: Path) -> None:
    work = trainer(base, tmp_path / "out", [SaveDelta(tmp_path / "delta")], learning_rate=1e30)
    with pytest.raises(DeltaError, match="NaN or infinite values; training diverged"):
        work.train()
    assert not (tmp_path / "delta").exists()


def test_the_delta_has_a_model_card(whole: tuple[Path, Trainer], base: Path) -> None:
    folder, work = whole
    for delta in (folder / "delta", folder / "out" / "checkpoint-2" / "delta"):
        card = ModelCard.load(delta / "README.md")
        assert card.data.library_name == "esft"
        assert card.data.pipeline_tag == "text-generation"
        steps = 2 if "checkpoint-2" in str(delta) else work.state.global_step
        assert f"| steps | {steps} |" in card.text
        assert f"| learning_rate | {work.args.learning_rate} |" in card.text
        for layer, ids in SELECTION.experts.items():
            assert f"| {layer} | {', '.join(map(str, ids))} |" in card.text
        assert f"{base.name}, specialised by ESFT" in card.text
        for private in (folder.parent, base.parent):
            assert str(private) not in (delta / "README.md").read_text()

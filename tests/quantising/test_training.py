"""`esft.train` with `frozen_dtype`: the promises hold; what trained goes into the exact base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from esft_kernels.quantised import Quantised
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esft
from esft.delta import attach_delta
from esft.errors import CheckError, DeltaError, EsftError, ModelError
from esft.experts import attached_layers
from esft.methods import expert
from esft.quantising.checkpoint import load_quantised
from esft.quantising.stored import stored_weights
from esft.trained_parts import TrainedParts
from tests.checkpoints import save_tiny
from tests.resumed_runs import cut_back, delta_bytes, logged, recipe, write_rows

KINDS = ("int8", "nf4")
SELECTION = {"metric": "token", "p": 0.3, "tokens": 64, "seq_len": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("base") / "tiny", "deepseek_v2")
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")


def run_of(base: Path, rows: Path, frozen: Any, **changes: Any) -> dict[str, Any]:
    wanted = recipe(base, rows, selection=SELECTION, **({"max_steps": 3} | changes))
    return wanted | {"frozen_dtype": frozen, "deterministic": True}


def merged_tensors(base: Path, run: Path, out: Path) -> dict[str, torch.Tensor]:
    esft.merge(base, run / "delta", out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(base: Path, rows: Path, tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    """Promises 1, 2 and 5: stored bits stay, the merge is what trained in the exact base."""
    seen: dict[str, Any] = {}
    save = expert.ExpertMethod.save
    prepare = expert.ExpertMethod.prepare

    def bits(model: Any) -> dict[str, torch.Tensor]:
        return {
            f"{path}.{name}": tensor.clone()
            for path, weight in stored_weights(model).items()
            for name, tensor in weight.named_buffers()
        }

    def prepared(self: Any, model: Any) -> Any:
        seen["model"] = prepare(self, model)
        seen["bits"] = bits(model)
        return seen["model"]

    def saved(self: Any, model: Any, *given: Any) -> None:
        seen["graded"] = {n for n, p in model.named_parameters() if p.requires_grad}
        seen["after"] = bits(model)
        seen["trained"] = {
            (a.layer.index, name, number): a.banks.trained(name)[slot].detach().bfloat16()
            for a in attached_layers(model)
            for slot, number in enumerate(a.banks.selected)
            for name in a.banks.names
        }
        save(self, model, *given)

    monkeypatch.setattr(expert.ExpertMethod, "prepare", prepared)
    monkeypatch.setattr(expert.ExpertMethod, "save", saved)
    run = tmp_path / "run"
    result = esft.train(run_of(base, rows, kind), run)

    assert seen["bits"].keys() == seen["after"].keys() != set()
    for name, tensor in seen["bits"].items():
        assert torch.equal(tensor, seen["after"][name]), name
    assert all(".esft.trainable." in name for name in seen["graded"])
    assert {type(a.banks.rest("down_proj")) for a in attached_layers(seen["model"])} == {Quantised}
    # A checkpoint holds what trains, and what the optimizer knows of it.
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    with safe_open(newest / "state.safetensors", framework="pt") as file:
        state = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    kept = {name for name in state if name.startswith("parameter/")}
    assert kept == {f"parameter/{name}" for name in seen["graded"]}
    moments = [name for name in state if name.endswith(("/exp_avg", "/exp_avg_sq"))]
    assert len(moments) == 2 * len(kept)
    assert result.moved is not None
    assert result.moved.share > 0.9

    before, after = load_file(base / "model.safetensors"), merged_tensors(base, run, tmp_path / "m")
    selected = json.loads((run / "selection.json").read_text())["experts"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    experts = {
        f"model.layers.{layer}.mlp.experts.{number}.{half}_proj.weight"
        for layer, ids in selected.items()
        for number in ids
        for half in ("gate", "up", "down")
    }
    assert changed == experts
    for (layer, name, number), value in seen["trained"].items():
        prefix = f"model.layers.{layer}.mlp.experts.{number}"
        halves = ("gate", "up") if name == "gate_up_proj" else ("down",)
        own = torch.cat([after[f"{prefix}.{half}_proj.weight"] for half in halves])
        assert torch.equal(own, value)

    # The logits are those of the exact base with the selected experts replaced.
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").eval()
    for (layer, name, number), value in seen["trained"].items():
        plain.get_parameter(f"model.layers.{layer}.mlp.experts.{name}").data[number] = value
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="bfloat16").eval()
    ids = torch.arange(3, 40)[None]
    for model in (plain, merged):
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, merged(input_ids=ids).logits)
    manifest = json.loads((run / "delta" / "esft_config.json").read_text())
    assert manifest["training"]["frozen_dtype"] == {"experts": kind, "linear": kind}


def test_experts_are_selected_by_the_scores_of_the_base(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    for name, frozen in (("plain", None), ("few", {"experts": "nf4", "embeddings": "nf4"})):
        esft.train(run_of(base, rows, frozen, max_steps=1), tmp_path / name)
    for file in ("scores.json", "selection.json"):
        assert (tmp_path / "few" / file).read_text() == (tmp_path / "plain" / file).read_text()
    # How routing changed is told from where this run began, with rounded weights.
    before = [(tmp_path / n / "routing_before.json").read_text() for n in ("plain", "few")]
    assert before[0] != before[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "hot-lora"])
def test_other_methods_that_select(base: Path, rows: Path, tmp_path: Path, method: str) -> None:
    wanted = run_of(base, rows, {"experts": "nf4", "linear": "int8"}, method=method)
    wanted["dtype"] = "checkpoint"
    esft.train(wanted, tmp_path / "run")
    after = merged_tensors(base, tmp_path / "run", tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".mlp.experts." in name for name in changed)
    esft.verify(base, tmp_path / "run" / "delta")


def test_parts_that_train_are_not_rounded(base: Path, rows: Path, tmp_path: Path) -> None:
    wanted = run_of(base, rows, "nf4") | {"train": {"shared_experts": True}}
    esft.train(wanted, tmp_path / "run")
    after = merged_tensors(base, tmp_path / "run", tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[4] for name in changed} == {"experts", "shared_experts"}
    shared = [name for name in before if "shared_experts" in name]
    # Had it begun from rounded weights, no number would be near the base's.
    for name in shared:
        assert (after[name].float() - before[name].float()).abs().max() < 0.1


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(base: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    wanted = run_of(base, rows, "nf4", max_steps=4)
    esft.train(wanted, run)
    whole, lines = delta_bytes(run), logged(run)
    cut_back(run, 2)
    esft.train(wanted, run, resume=True)
    assert delta_bytes(run) == whole
    assert logged(run)[-3:] == lines[-3:]


def test_a_run_does_not_go_on_over_other_frozen_weights(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    esft.train(run_of(base, rows, "nf4", max_steps=2), run)
    cut_back(run, 2)
    for other, told in (("int8", "nf4 then, int8 now"), (None, "nf4 then, unset now")):
        with pytest.raises(EsftError) as caught:
            esft.train(run_of(base, rows, other, max_steps=2), run, resume=True)
        assert "cannot resume, the run has changed" in str(caught.value)
        assert f"recipe.frozen_dtype: {told}" in str(caught.value)


def test_a_delta_is_not_loaded_into_rounded_weights(base: Path, rows: Path, tmp_path: Path) -> None:
    esft.train(run_of(base, rows, "nf4", max_steps=1), tmp_path / "run")
    model = load_quantised(base, {"linear": "int8"}, TrainedParts())
    for load in (
        lambda: attach_delta(model, base, tmp_path / "run" / "delta"),
        lambda: esft.load_delta(model, tmp_path / "run" / "delta"),
    ):
        with pytest.raises(DeltaError) as caught:
            load()
        assert str(caught.value).endswith(
            "was trained over frozen weights with experts in nf4, linear in nf4, and this model "
            "keeps them with linear in int8: a delta is loaded into the base as it is; load the "
            "model without frozen_dtype, or merge the delta"
        )


def test_a_delta_refuses_a_quantised_copy_of_its_base(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    esft.train(run_of(base, rows, "int8", max_steps=1), tmp_path / "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckError, match=rf"{name}.*F8_E4M3"):
        esft.merge(copy, tmp_path / "run" / "delta", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_that_is_quantised_itself_is_refused_as_ever(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the weights are stored as fp8"):
        esft.train(run_of(copy, rows, "nf4"), tmp_path / "run")
    assert not (tmp_path / "run").exists()

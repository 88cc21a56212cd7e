"""Checkpoints that bring their own code, with experts as a list of modules.

The oracle is transformers' own DeepSeek-V2 on the same files, where the experts are stacked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esft.changes import expert_changes
from esft.delta import attach_delta, write_delta
from esft.errors import ModelError
from esft.experts import attach, attached_layers, detach
from esft.fingerprint import fingerprint
from esft.loading import load_model, load_skeleton
from esft.locating import trusting_remote_code
from esft.merging import merge, verify
from esft.moe import inspect, moe_layers
from esft.profiling import profile
from esft.selection import Selection
from esft.shards import open_checkpoint
from tests.checkpoints import save_tiny
from tests.command import esft, esft_json
from tests.deltas import PICKED
from tests.models import EXPERTS
from tests.remote import with_own_code
from tests.training_loop import batches


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers copies the code that it runs; not into the user's own cache."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V2 checkpoint in bf16, with a tokenizer."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "deepseek", "deepseek_v2")
    load_model(folder, dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture
def own_code(base: Path, tmp_path: Path) -> Path:
    """The same weights, loaded by code in the folder."""
    return with_own_code(base, tmp_path / "own")


def load(folder: Path, **options: Any) -> Any:
    with trusting_remote_code():
        model = load_model(folder, **options)
    for parameter in model.parameters():  # loaded weights are unaligned views of the file
        parameter.data = parameter.data.clone()
    return model


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    texts = ["the sea", "a tree in a wood", "12 + 30", "one, two, three", "x"]
    path.write_text("".join(json.dumps({"prompt": t, "completion": t[::-1]}) + "\n" for t in texts))
    return path


def test_code_runs_only_when_asked_for(own_code: Path, tmp_path: Path) -> None:
    for call in (load_model, load_skeleton, inspect):
        with pytest.raises(ModelError, match=r"code of its own \(auto_map\).*--trust-remote-code"):
            call(own_code)  # type: ignore[operator]
    assert not (tmp_path / "modules").exists()
    assert type(load(own_code)).__name__ == "ListedForCausalLM"
    with pytest.raises(ModelError, match="--trust-remote-code"):  # not for longer than that
        load_model(own_code)


def test_the_scores_are_those_of_stacked_experts(
    base: Path, own_code: Path, tmp_path: Path
) -> None:
    expected = profile(base, rows(tmp_path)).layers
    with trusting_remote_code():
        found = profile(own_code, rows(tmp_path)).layers
    assert found.keys() == expected.keys()
    for index, layer in expected.items():
        assert found[index].token == layer.token
        assert found[index].gate == pytest.approx(layer.gate, abs=1e-7)


@pytest.mark.parametrize(
    ("normalised", "always"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_a_constant_factor_is_left_out_whether_or_not_the_router_applies_it(
    base: Path, tmp_path: Path, normalised: bool, always: bool
) -> None:
    """DeepSeek-V2's own code multiplies by it only where it does not normalise, V3's always."""
    models = []
    for name, factor in (("a", 1.0), ("b", 2.5)):
        folder = with_own_code(
            base, tmp_path / name, norm_topk_prob=normalised, routed_scaling_factor=factor
        )
        code = folder / "modeling_listed.py"
        text = code.read_text()
        conditional = "        else:\n            weight = weight * "
        assert conditional in text
        if always:
            code.write_text(text.replace(conditional, "        weight = weight * "))
        models.append(folder)
    with trusting_remote_code():
        first, second = (profile(model, rows(tmp_path)).layers[1] for model in models)
    assert second.gate == pytest.approx(first.gate, abs=1e-6)
    assert (sum(first.gate) == pytest.approx(1, abs=1e-5)) == normalised


def test_the_delta_is_that_of_stacked_experts(base: Path, own_code: Path, tmp_path: Path) -> None:
    """Gradients agree as far as fp32 does, and from the same trained numbers come equal bytes."""
    models = {"stacked": load(base, dtype="checkpoint"), "own": load(own_code, dtype="checkpoint")}
    ids = batches(1)[0]
    grads: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        model.float()
        attach(model, Selection(experts=PICKED))
        model(input_ids=ids, labels=ids).loss.backward()
        found = []
        for layer in attached_layers(model):
            trained = {n: layer.banks.trained(n).grad for n in layer.banks.names}
            if name == "own" and trained:
                both = [trained.pop(f"{half}_proj.weight") for half in ("gate", "up")]
                trained = {"both": torch.cat(both, dim=1), "down": trained["down_proj.weight"]}
            found += [grad.flatten() for grad in trained.values() if grad is not None]
        grads[name] = torch.cat(found)
    assert (grads["own"] - grads["stacked"]).norm() < 1e-5 * grads["stacked"].norm()
    files = []
    for model, source in ((models["stacked"], base), (models["own"], own_code)):
        changes = expert_changes(model)
        for change in changes:  # as if trained: by the tensor's name, so the same for both
            generator = torch.Generator().manual_seed(sum(change.name.encode()))
            change.value.add_(torch.randn(change.value.shape, generator=generator) * 0.01)
        folder = tmp_path / f"delta {len(files)}"
        folder.mkdir()
        write_delta(folder, fingerprint(open_checkpoint(source)), changes, {"method": "esft"})
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_train_merge_and_reload(own_code: Path, tmp_path: Path) -> None:
    """By the command; the trained experts, and nothing else, are what the run trained."""
    data, run, merged = rows(tmp_path), tmp_path / "run", tmp_path / "merged"
    trust = "--trust-remote-code"
    assert esft_json("inspect", own_code, trust)["model_type"] == "listed_moe"
    options = ["--data", data, "--steps", "3", "--lr", "1e-2", "--set", "data.max_length=32"]
    refused = esft("train", own_code, *options, "--out", run)
    assert refused.returncode == 1
    assert trust in refused.stderr
    assert not run.exists()
    esft_json("train", own_code, *options, "--out", run, trust)
    merge(own_code, run / "delta", merged)
    assert verify(own_code, run / "delta", merged).changed > 0
    picked = json.loads((run / "selection.json").read_text())["experts"]
    old, new = (load_file(folder / "model.safetensors") for folder in (own_code, merged))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer, experts in picked.items()
        for expert in experts
        for name in ("gate", "up", "down")
    }
    # Loaded by the base's code with the delta put in, and by the merged folder: the same model.
    with trusting_remote_code():
        attached = attach_delta(load(own_code, dtype="checkpoint"), own_code, run / "delta")
    again = load(merged, dtype="checkpoint")
    for name, tensor in attached.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(attached(ids).logits, again(ids).logits)


def test_bf16_experts_train_in_fp32_and_compute_in_bf16(own_code: Path) -> None:
    model = load(own_code, dtype="bfloat16")
    ids = batches(1)[0]
    with torch.no_grad():
        expected = model(ids).logits
    attach(model, Selection(experts=PICKED))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    bank = attached_layers(model)[0].banks.trained("up_proj.weight")
    assert bank.dtype == torch.float32
    with torch.no_grad():
        bank.add_(1e-6)  # a bf16 number of this size would not move
    model(input_ids=ids, labels=ids).loss.backward()
    assert bank.grad is not None
    detach(model)
    layer = moe_layers(model)[0]
    assert len(layer.experts) == EXPERTS  # type: ignore[arg-type]
    assert {p.dtype for p in layer.experts.parameters()} == {torch.bfloat16}


def test_a_router_that_does_not_say_what_it_chose(own_code: Path, tmp_path: Path) -> None:
    code = own_code / "modeling_listed.py"
    text = code.read_text()
    assert "return index, weight, None" in text
    text = text.replace("return index, weight, None", "return {'index': index, 'weight': weight}")
    text = text.replace(
        "index, weight, _ = self.gate(hidden)", "index, weight = self.gate(hidden).values()"
    )
    code.write_text(text)
    with (
        trusting_remote_code(),
        pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts: its router does not return"),
    ):
        profile(own_code, rows(tmp_path))

"""`esft train`, `merge`, `verify`: what they refuse, with which exit code, and what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import save_tiny
from tests.command import Argument, esft, refusal

ROW = '{"prompt": "2+2=", "completion": "4"}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "base", "qwen3_moe")


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed before its delta was written, but for a copy of that."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.jsonl").write_text(ROW * 4)
    (folder / "recipe.yaml").write_text(
        f"model: {base}\ndata: {{train: train.jsonl, max_length: 32}}\n"
        "selection: {top_n: 1}\n"
        "training: {max_steps: 2, save_strategy: steps, save_steps: 1, learning_rate: 1e-2}\n"
    )
    result = esft("train", folder / "recipe.yaml", "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    (folder / "run" / "delta").rename(folder / "delta")
    return folder


@pytest.fixture
def here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder beside files that are wrong in one way each."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "good.jsonl").write_text(ROW)
    (bad / "broken.jsonl").write_text(ROW + '{"prompt": "2+2=", "compl\n')
    (bad / "unanswered.jsonl").write_text(ROW + ROW + '{"prompt": "2+2="}\n')
    (bad / "empty.json").write_text('{"experts": {}}')
    (bad / "key.yaml").write_text(f"model: {base}\nmetod: esft\ndata: {{train: good.jsonl}}\n")
    (bad / "p.yaml").write_text(
        f"model: {base}\ndata: {{train: good.jsonl}}\nselection:\n  p: 1.5\n"
    )
    (bad / "data.yaml").write_text(f"model: {base}\ndata:\n  train: broken.jsonl\n")
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=1, vocab_size=300)
    config.save_pretrained(bad / "dense")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["BASE", "--data", "../bad/none.jsonl"], "bad/none.jsonl: no such data file"),
        (["BASE", "--data", "../bad/broken.jsonl"], "bad/broken.jsonl:2: not JSON"),
        (["BASE", "--data", "../bad/unanswered.jsonl"], "unanswered.jsonl:3: a line without an"),
        (["BASE", "--data", "../bad/good.jsonl", "--eval", "none.jsonl"], "none.jsonl: no such"),
        (["BASE", "--data", "../bad/good.jsonl", "--p", "0"], "error: --p: p must be above 0"),
        (["BASE", "--data", "../bad/good.jsonl", "--p", "1.5"], "error: --p: p must be above 0"),
        (
            ["BASE", "--data", "../bad/good.jsonl", "--method", "esfft"],
            "error: --method: input should be 'esft', 'random', 'lora', 'hot-lora' or 'full' "
            "(got 'esfft')",
        ),
        (
            ["BASE", "--data", "../bad/good.jsonl", "--metric", "tokens"],
            "error: --metric: input should be 'token' or 'gate' (got 'tokens')",
        ),
        (
            ["BASE", "--data", "../bad/good.jsonl", "--set", "training.max_stps=3"],
            'error: --set training.max_stps: unknown key; did you mean "max_steps"?',
        ),
        (
            ["BASE", "--data", "../bad/good.jsonl", "--selection", "../bad/empty.json"],
            "bad/empty.json: the selection is empty",
        ),
        (
            ["BASE", "--data", "../bad/good.jsonl", "--selection", "x.json", "--p", "0.2"],
            "error: --p: contradicts selection, which is 'x.json'",
        ),
        (["../bad/dense", "--data", "../bad/good.jsonl"], "llama: this model is dense"),
        (["none/model", "--data", "../bad/good.jsonl"], "none/model: "),
        (["BASE", "--data", "../bad/good.jsonl", "--steps", "2", "--lr", "-1"], "error: --lr: "),
        (["BASE", "--data", "../bad/good.jsonl", "--device", "tpu9"], "error: --device tpu9: "),
        (["BASE"], "base: a folder, not a recipe; to train a model without a recipe, give --data"),
        (["tiny-moe"], "tiny-moe: no such recipe; to train a model without a recipe, give --data"),
        (["../bad/key.yaml"], 'key.yaml:2: metod: unknown key; did you mean "method"?'),
        (["../bad/p.yaml"], "p.yaml:4: selection.p: p must be above 0 and at most 1 (it is 1.5)"),
        (["../bad/data.yaml"], "bad/broken.jsonl:2: not JSON"),
        (["../bad/key.yaml", "--data", "x.jsonl"], "error: --data: is for a model; ../bad/key"),
        (["../bad/good.jsonl"], "good.jsonl:1: "),
    ],
)
def test_train_refuses(here: Path, base: Path, arguments: list[str], message: str) -> None:
    given = [str(base) if argument == "BASE" else argument for argument in arguments]
    assert message in refusal("train", *given, "--out", "run")
    assert not list(here.iterdir())


def test_a_run_that_exists_is_not_overwritten(run: Path) -> None:
    before = sorted(path for path in (run / "run").rglob("*"))
    found = refusal("train", run / "recipe.yaml", "--out", run / "run")
    assert found.endswith("run: the folder exists and is not empty; choose another --out")
    assert sorted(path for path in (run / "run").rglob("*")) == before


def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_resume_exit_codes(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    resume: list[Argument] = ["train", folder / "recipe.yaml", "--out", folder / "run", "--resume"]
    result = esft(*resume, "--lr", "5e-3")
    assert result.returncode == 1
    assert result.stderr.endswith("\n  recipe.training.learning_rate: 0.01 then, 0.005 now\n")
    for step in (2, 1):
        state = folder / "run" / "checkpoints" / f"step-00000{step}" / "state.safetensors"
        content = bytearray(state.read_bytes())
        content[-1] ^= 1
        state.write_bytes(content)
    result = esft(*resume)
    assert result.returncode == 3
    for step in (1, 2):
        assert f"step-00000{step}/state.safetensors: damaged" in result.stderr
    content[-1] ^= 1
    state.write_bytes(content)
    result = esft(*resume)
    assert result.returncode == 0
    assert "going on from step 1 instead" in result.stderr
    name = "esft_delta.safetensors"
    assert (folder / "run" / "delta" / name).read_bytes() == (run / "delta" / name).read_bytes()


def test_a_wrong_base_is_exit_code_3_and_named_by_a_tensor(
    base: Path, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    another = save_tiny(tmp_path / "another", "mixtral")
    merged = tmp_path / "merged"
    for model, named in ((other, "model.layers.2.mlp.gate.weight has other values"), (another, "")):
        for arguments in (
            ["merge", model, run / "delta", "--out", merged],
            ["verify", model, run / "delta"],
            ["generate", model, "--delta", run / "delta", "--prompt", "a"],
        ):
            result = esft(*arguments)
            assert result.returncode == 3, result.stderr
            assert "Traceback" not in result.stderr
            assert f"the delta was made from another base: tensor {named}" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "other"]


def test_merge_and_verify_refuse(base: Path, run: Path, here: Path) -> None:
    delta = run / "delta"
    assert "no esft_config.json in this folder" in refusal("merge", base, run, "--out", "m")
    assert "no such folder" in refusal("merge", "/none", delta, "--out", "m")
    assert "not empty" in refusal("merge", base, delta, "--out", base)
    assert "no esft_config.json" in refusal("verify", base, "none")
    assert "no model.safetensors" in refusal("verify", base, delta, "--merged", "none")
    found = refusal("verify", base, delta, "--merged", base, code=3)
    assert "is not what base and delta give" in found
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": None}, "method: missing or of the wrong kind"),
        ({"base": None}, "base: missing or of the wrong kind"),
        ({"base": {}}, "esft_base.json: damaged: its sha256 is not base.fingerprint"),
        ({"files": 3}, "files: not a JSON object"),
        ({"tensors": 3}, "tensors: missing or of the wrong kind"),
        ({"tensors": {}}, "in the weights but not in the manifest"),
        ({"format": "esft-delta/3"}, "install a newer esft: pip install --upgrade esft"),
        ({"format": "esft/1"}, "format: expected \"esft-delta/2\", found 'esft/1'"),
    ],
)
def test_manifests_of_the_wrong_shape(
    base: Path, run: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    shutil.copytree(run / "delta", tmp_path / "delta")
    file = tmp_path / "delta" / "esft_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert message in refusal("verify", base, tmp_path / "delta")


def test_an_adapter_in_a_pickle_is_refused(base: Path, run: Path, tmp_path: Path) -> None:
    options = ["--data", run / "train.jsonl", "--method", "lora", "--steps", "1"]
    assert esft("train", base, *options, "--out", tmp_path / "run").returncode == 0
    delta = tmp_path / "run" / "delta"
    found = refusal("verify", base, delta, "--merged", base)
    assert "an adapter's merge is computed, not copied" in found
    manifest = json.loads((delta / "esft_config.json").read_text())
    weights = manifest["files"].pop("adapter_model.safetensors")
    (delta / "adapter_model.safetensors").rename(delta / "adapter_model.bin")
    manifest["files"]["adapter_model.bin"] = weights
    (delta / "esft_config.json").write_text(json.dumps(manifest))
    found = refusal("merge", base, delta, "--out", tmp_path / "merged")
    assert "adapter_model.safetensors is not listed under files" in found
    # One that is there but not listed is not taken into account.
    shutil.copytree(run / "delta", tmp_path / "plain")
    (tmp_path / "plain" / "adapter_config.json").write_text("{}")
    assert esft("merge", base, tmp_path / "plain", "--out", tmp_path / "merged").returncode == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.config.model_type == "qwen3_moe"

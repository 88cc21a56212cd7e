"""Adapters of the official ESFT release: read and written, bit for bit, and refused by name.

`official_load` below is the loading of the official code (esft.py, `load_state_dict` and
`to_esft`), retold on names: which tensors of a model must be in an adapter, no more and no less.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from esft.delta import read_delta
from esft.errors import DeltaError, SelectionError
from esft.exporting import export
from esft.fingerprint import fingerprint
from esft.merging import merge
from esft.official import import_official
from esft.shards import open_checkpoint
from tests.command import esft, esft_json, refusal
from tests.deltas import save_base, train_delta

Tensors = dict[str, Tensor]
CONFIG = {
    "experts": {"1": [5, 0], "2": [3]},
    "shared_experts": False,
    "non_expert_modules": False,
}


def official_load(base: Tensors, adapter: Path) -> Tensors:
    """Return the model's tensors once the official code has loaded an adapter."""
    config = json.loads((adapter / "expert_cfg.json").read_text())
    state: Tensors = {}
    for file in adapter.glob("*.safetensors"):
        state.update(load_file(file))
    state = {f"model.{n}" if n.startswith("layers") else n: t for n, t in state.items()}
    trained = set()
    for name in base:
        words = name.split(".")
        if "experts" in words:
            expert = int(words[words.index("experts") + 1])
            if expert in config["experts"][words[2]]:
                trained.add(name)
        elif "shared_experts" in words:
            if config["shared_experts"]:
                trained.add(name)
        elif config["non_expert_modules"]:
            trained.add(name)
    assert state.keys() == trained  # `load_state_dict` is strict
    return base | state


def moved(base: Tensors, names: Callable[[str], bool]) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (tensor + torch.randn(tensor.shape, generator=generator) * 1e-2).to(tensor.dtype)
        for name, tensor in base.items()
        if names(name)
    }


def is_picked(name: str) -> bool:
    return any(f"layers.{n}.mlp.experts.{e}." in name for n, e in ((1, 5), (1, 0), (2, 3)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("official") / "base", "deepseek_v2")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter as the official code writes it, in two files."""
    return write(tmp_path / "adapter", moved(weights(base), is_picked), CONFIG, files=2)


def weights(folder: Path) -> Tensors:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def write(folder: Path, tensors: Tensors, config: Any, files: int = 1) -> Path:
    folder.mkdir()
    (folder / "expert_cfg.json").write_text(json.dumps(config))
    for number in range(files):
        own = {n: t for i, (n, t) in enumerate(tensors.items()) if i % files == number}
        save_file(own, folder / f"model-{number + 1:05d}-of-{files:05d}.safetensors")
    return folder


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_import_then_export_is_bitwise_the_adapter(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    delta = import_official(adapter, base, tmp_path / "delta")
    assert delta.method == "esft"
    assert delta.manifest["selection"]["experts"] == CONFIG["experts"]
    assert delta.manifest["base"]["architecture"] == "DeepseekV2ForCausalLM"
    assert equal(weights(tmp_path / "delta"), weights(adapter))
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert equal(weights(merged), official_load(weights(base), adapter))
    export(tmp_path / "delta", tmp_path / "again", official=True)
    assert equal(weights(tmp_path / "again"), weights(adapter))
    assert json.loads((tmp_path / "again" / "expert_cfg.json").read_text()) == CONFIG


def test_export_then_import_is_bitwise_the_delta(base: Path, tmp_path: Path) -> None:
    train_delta(base, tmp_path / "delta", {2: [3, 1]})
    export(tmp_path / "delta", tmp_path / "adapter", official=True)
    # The official code looks up every layer with experts, chosen or not.
    assert json.loads((tmp_path / "adapter" / "expert_cfg.json").read_text())["experts"] == {
        "1": [],
        "2": [1, 3],
    }
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert equal(weights(merged), official_load(weights(base), tmp_path / "adapter"))
    import_official(tmp_path / "adapter", base, tmp_path / "again")
    one, other = read_delta(tmp_path / "delta"), read_delta(tmp_path / "again")
    assert one.manifest["tensors"] == other.manifest["tensors"]
    assert one.base == other.base == fingerprint(open_checkpoint(base))


@pytest.mark.parametrize(("shared", "others"), [(True, False), (False, True), (True, True)])
def test_shared_experts_and_the_rest(
    shared: bool, others: bool, base: Path, tmp_path: Path
) -> None:
    def trained(name: str) -> bool:
        if "shared_experts" in name:
            return shared
        return is_picked(name) or (others and ".experts." not in name)

    config = CONFIG | {"shared_experts": shared, "non_expert_modules": others}
    adapter = write(tmp_path / "adapter", moved(weights(base), trained), config)
    import_official(adapter, base, tmp_path / "delta")
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    assert equal(weights(merged), official_load(weights(base), adapter))
    export(tmp_path / "delta", tmp_path / "again", official=True)
    assert equal(weights(tmp_path / "again"), weights(adapter))
    assert json.loads((tmp_path / "again" / "expert_cfg.json").read_text()) == config


def test_names_of_the_first_release(base: Path, adapter: Path, tmp_path: Path) -> None:
    short = {name.removeprefix("model."): tensor for name, tensor in weights(adapter).items()}
    old = write(tmp_path / "old", short, CONFIG)
    import_official(old, base, tmp_path / "delta")
    assert equal(weights(tmp_path / "delta"), weights(adapter))


NAME = "model.layers.1.mlp.experts.5.up_proj.weight"
OTHER = "model.layers.1.mlp.experts.4.up_proj.weight"


def without(tensors: Tensors, _: dict[str, Any]) -> None:
    del tensors[NAME]


def with_another(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[OTHER] = tensors[NAME].clone()


def no_such_expert(_: Tensors, config: dict[str, Any]) -> None:
    config["experts"]["1"] = [5, 0, 8]


def widened(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[NAME] = tensors[NAME].float()


def turned(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[NAME] = tensors[NAME].t().contiguous()


def diverged(tensors: Tensors, _: dict[str, Any]) -> None:
    tensors[NAME][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, f"tensor {NAME}: not there, though expert_cfg.json names"),
        (with_another, f"tensor {OTHER}: there, though expert_cfg.json does not name"),
        (no_such_expert, "the base has no tensors of layer 1 expert 8, which expert_cfg.json"),
        (widened, f"tensor {NAME}: is F32 [24, 32], BF16 [24, 32] is expected"),
        (turned, f"tensor {NAME}: is BF16 [32, 24], BF16 [24, 32] is expected"),
        (diverged, f"tensor {NAME} has NaN or infinite values"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    change: Callable[..., None], message: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors, config = weights(adapter), json.loads(json.dumps(CONFIG))
    change(tensors, config)
    wrong = write(tmp_path / "wrong", tensors, config)
    with pytest.raises(DeltaError) as caught:
        import_official(wrong, base, tmp_path / "delta")
    assert message in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "wrong"]


def test_damaged_files_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "expert_cfg.json").write_text('{"experts": {"1": [5')
    with pytest.raises(SelectionError, match=r"expert_cfg\.json:1: not JSON"):
        import_official(adapter, base, tmp_path / "delta")
    (adapter / "expert_cfg.json").unlink()
    with pytest.raises(SelectionError, match="--config"):
        import_official(adapter, base, tmp_path / "delta")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    file = sorted(adapter.glob("*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(DeltaError, match=f"{file}: this weights file is damaged"):
        import_official(adapter, base, tmp_path / "delta", config=config)
    (adapter / "twice.safetensors").write_bytes(data)
    file.write_bytes(data)
    with pytest.raises(DeltaError, match=r"twice\.safetensors: tensor \S+ is also in model-00001"):
        import_official(adapter, base, tmp_path / "delta", config=config)
    for path in adapter.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(DeltaError, match="no safetensors file in this folder"):
        import_official(adapter, base, tmp_path / "delta", config=config)
    assert not (tmp_path / "delta").exists()


def test_what_the_official_format_cannot_hold(base: Path, tmp_path: Path) -> None:
    fused = save_base(tmp_path / "fused", "gpt_oss")
    train_delta(fused, tmp_path / "rows")
    with pytest.raises(DeltaError, match="holds several experts; the official format has one"):
        export(tmp_path / "rows", tmp_path / "out", official=True)
    assert not (tmp_path / "out").exists()


def test_the_commands(base: Path, adapter: Path, tmp_path: Path) -> None:
    delta, again = tmp_path / "delta", tmp_path / "again"
    config = tmp_path / "cfg.json"
    (adapter / "expert_cfg.json").rename(config)
    options = ["--config", config, "--base", base, "--out", delta]
    found = esft_json("import", adapter, *options)
    assert (found["delta"], found["tensors"]) == (str(delta), 9)
    assert found["experts"] == CONFIG["experts"]
    result = esft("export", delta, "--official", "--out", again)
    assert result.returncode == 0, result.stderr
    assert equal(weights(again), weights(adapter))
    assert "not empty" in refusal("import", adapter, *options)
    found = refusal("import", adapter, "--base", base, "--out", tmp_path / "x")
    assert "expert_cfg.json: no such selection file" in found

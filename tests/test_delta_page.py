"""docs/delta.md is enough to read and merge a delta: its own code, without esft, gives our bits."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from esft.compression import encode
from esft.exporting import export
from esft.fingerprint import fingerprint_digest, tokenizer_digest
from esft.merging import merge
from esft.shards import open_checkpoint, read_blocks
from tests.checkpoints import save_tiny
from tests.deltas import BASE, CONFIG, save_base, train_delta
from tests.faults.material import Material

PAGE = Path(__file__).parents[1] / "docs" / "delta.md"
MERGE, DECODE, GROWN = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files and its delta: experts apart, and fused."""
    root = tmp_path_factory.mktemp("made")
    save_base(root / "base", request.param, max_shard_size="30KB")
    train_delta(root / "base", root / "delta")
    return root


def test_the_page_s_merge_is_ours(made: Path, tmp_path: Path) -> None:
    export(made / "delta", tmp_path / "cut", shard_size=4000)
    ours = merge(made / "base", made / "delta", tmp_path / "ours")
    call = "import sys; assert 'esft' not in sys.modules; merge(*sys.argv[1:])"
    for delta in (made / "delta", tmp_path / "cut"):
        theirs = tmp_path / "theirs.safetensors"
        command = [sys.executable, "-c", f"{MERGE}\n{call}", made / "base", delta, theirs]
        subprocess.run(command, check=True, cwd=tmp_path)
        found, wanted = load_file(theirs), loaded(ours)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_page_s_decoding_is_ours(made: Path, tmp_path: Path) -> None:
    export(made / "delta", tmp_path / "coded", base=made / "base", compress=True)
    page: dict[str, Callable[..., bytes]] = {}
    exec(DECODE, page)
    coded, plain, base = loaded(tmp_path / "coded"), loaded(made / "delta"), loaded(made / "base")
    listed = json.loads((tmp_path / "coded" / CONFIG).read_text())["tensors"]
    assert listed.keys() == plain.keys()
    for name, about in listed.items():
        old = base[name][about["rows"]] if "rows" in about else base[name]
        found = page["decode"](coded[name].numpy().tobytes(), raw(old), plain[name].itemsize)
        assert found == raw(plain[name])


@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_page_s_decoding_of_several_blocks(width: int) -> None:
    page: dict[str, Callable[..., bytes]] = {}
    exec(DECODE, page)
    generator = numpy.random.default_rng(0)
    value, base = (generator.integers(0, 256, 9 << 20, numpy.uint8).tobytes() for _ in "ab")
    assert page["decode"](b"".join(encode([value], [base], width)), base, width) == value


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_page_s_words_on_the_base(made: Path, tmp_path: Path) -> None:
    def digest(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    base = json.loads((made / "delta" / BASE).read_text())
    assert base["format"] == "esft-base/2"
    for name, entry in open_checkpoint(made / "base").entries.items():
        found = hashlib.sha256(b"".join(read_blocks(entry))).hexdigest()
        described = {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": found}
        assert base["tensors"].pop(name) == described
    assert base["tensors"] == {}
    base = json.loads((made / "delta" / BASE).read_text())["tensors"]
    config = json.loads((made / "delta" / CONFIG).read_text())
    assert config["base"]["fingerprint"] == digest(base) == fingerprint_digest(base)
    folder = save_tiny(tmp_path / "with tokenizer")
    file = json.loads((folder / "tokenizer.json").read_text())
    model, added = file["model"], [[t["id"], t["content"]] for t in file["added_tokens"]]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    assert tokenizer_digest(folder) == digest([model["type"], model["vocab"], merges, added])


def test_the_page_s_sum_is_ours(tmp_path: Path) -> None:
    material, page = Material(tmp_path), {}
    exec(GROWN, page)
    manifest = json.loads((material.low_rank / CONFIG).read_text())
    factors, base = loaded(material.low_rank), loaded(material.base)
    assert manifest["coding"] == "low-rank/1"
    assert len(factors) == 2 * len(manifest["tensors"])
    for name, about in manifest["tensors"].items():
        before = base[name][about["rows"]] if "rows" in about else base[name]
        sides = [factors[f"{name}.{side}"] for side in ("left", "right")]
        for side, factor in zip(("left", "right"), sides, strict=True):
            digest = hashlib.sha256(factor.numpy().tobytes()).hexdigest()
            assert about["factors"][side] == digest
        value = page["grown"](before, *sides, **manifest["low_rank"])
        data = value.contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(data).hexdigest() == about["sha256"]
        assert data == material.low_rank_values[name]

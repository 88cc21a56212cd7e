"""N4, N6, N7: what is frozen stays, a merge is what was trained, the published selections."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from esft.changes import trained_changes
from esft.delta import read_delta, write_delta
from esft.experts import attach, detach
from esft.fingerprint import fingerprint
from esft.merging import merge
from esft.moe import trainable_parameters
from esft.scores import Scores
from esft.selection import Selection, select
from esft.shards import open_checkpoint
from esft.trained_parts import PARTS
from esft.unmerging import unmerge
from tests.deltas import load, raw, save_base
from tests.families import small
from tests.training_loop import train_steps

PICKED = {1: [5, 0], 2: [3]}
# A tensor with all experts of a layer, in a model or on disk; and one of a single expert.
STACK = re.compile(r"layers\.(\d+)\..*(experts\.\w+_proj(_bias)?|(in|out)put_linear\.weight)$")
ONE = re.compile(r"layers\.(\d+)\..*experts\.(\d+)\.")

Hashes = dict[tuple[str, int | None], str]


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def hashes(tensors: Iterable[tuple[str, Tensor]]) -> Hashes:
    """Hash every tensor, and every expert of a stack by itself."""
    found: Hashes = {}
    for name, tensor in tensors:
        pieces: Any = enumerate(tensor) if STACK.search(name) else [(None, tensor)]
        for expert, piece in pieces:
            found[name, expert] = hashlib.sha256(raw(piece)).hexdigest()
    return found


def is_picked(name: str, expert: int | None) -> bool:
    place = STACK.search(name) or ONE.search(name)
    if place is None:
        return False
    return (int(place[2]) if expert is None else expert) in PICKED.get(int(place[1]), [])


def check_frozen(before: Hashes, after: Hashes) -> None:
    """Check that the picked experts have other hashes, and that nothing else has."""
    assert before.keys() == after.keys()
    for piece, digest in after.items():
        assert (digest == before[piece]) != is_picked(*piece), piece
    assert any(is_picked(*piece) for piece in after)


@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v2",
        "qwen3_moe",
        "mixtral",
        "olmoe",
        "gpt_oss",
        "granitemoe",
        "nemotron_h",
        "llama4_text",
    ],
)
def test_n4_frozen_tensors_have_the_hashes_that_they_had(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    model = load(base)
    before = hashes(model.state_dict().items())
    attach(model, Selection(experts=PICKED))
    train_steps(model, 4)
    check_frozen(before, hashes(model.state_dict().items()))  # still attached
    found = fingerprint(open_checkpoint(base))
    (tmp_path / "delta").mkdir()
    write_delta(tmp_path / "delta", found, trained_changes(model, found), {"method": "esft"})
    check_frozen(before, hashes(detach(model).state_dict().items()))
    merged = merge(base, tmp_path / "delta", tmp_path / "merged")
    check_frozen(hashes(stored(base).items()), hashes(stored(merged).items()))


@pytest.mark.parametrize("files", ["one tensor an expert", "fused"])
@pytest.mark.parametrize(
    "family",
    [
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "jamba",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
    ],
)
def test_n6_merging_and_back(family: str, files: str, tmp_path: Path) -> None:
    """Everything moves that may: experts, shared experts, routers and the rest."""
    base = tmp_path / "base"
    small(family).save_pretrained(base, save_original_format=files != "fused")
    model = attach(load(base), Selection(experts={1: PICKED[1]}), **dict.fromkeys(PARTS, True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += torch.randn(parameter.shape, generator=generator)
    found = fingerprint(open_checkpoint(base))
    delta = tmp_path / "delta"
    delta.mkdir()
    write_delta(delta, found, trained_changes(model, found), {"method": "esft", "base": {}})
    assert bool(read_delta(delta).rows) == (files == "fused")
    merged = merge(base, delta, tmp_path / "merged")
    expected = detach(model).state_dict()
    for name, tensor in load(merged).state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    again = stored(unmerge(merged, delta, tmp_path / "again", base=base))
    for name, tensor in stored(base).items():
        assert raw(again[name]) == raw(tensor), name


OFFICIAL = Path(__file__).parents[3] / "shared" / "golden" / "official-esft"


@functools.cache
def published(task: str) -> tuple[dict[str, list[int]], dict[int, list[int]]]:
    """Return the experts of a released configuration, and those that its scores select here."""
    config = json.loads((OFFICIAL / f"{task}.config.json").read_text())
    found = select(Scores.read(OFFICIAL / f"{task}.scores.json"), preset="official-token")
    return config["experts"], found.experts


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"the official files are not in {OFFICIAL}")
@pytest.mark.parametrize("what", ["ids", "order"])
@pytest.mark.parametrize("layer", range(1, 27))
@pytest.mark.parametrize("task", ["intent", "translation"])
def test_n7_a_published_selection_comes_out(task: str, layer: int, what: str) -> None:
    expected, found = published(task)
    assert expected.keys() == {str(known) for known in found} == {str(n) for n in range(1, 27)}
    if what == "ids":
        assert set(found[layer]) == set(expected[str(layer)])
    else:
        assert found[layer] == expected[str(layer)]

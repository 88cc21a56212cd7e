"""Streamed profiles: the scores of resident ones to the last bit, every byte read once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from esft.errors import ModelError
from esft.moe import moe_layers
from esft.streaming.decoder import decoder_layers
from esft.weight_source import WeightSource
from tests.command import python_process
from tests.models_of_ours.tiny_models import NAMES as OURS
from tests.streaming.streams import IN_MEMORY, LOOKS_BACK, resident, save, streamed
from tests.test_families import COVERED

# What they have beyond a list of equal layers.
FAMILIES = [
    "deepseek_v2",  # shared experts, a dense first layer
    "deepseek_v4",  # layers that route by token id, four streams of hidden states
    "gpt_oss",  # sliding windows, biases
    "jamba",  # layers of three kinds
    "llama4_text",  # asks the embeddings where they are before it calls them
    "longcat_flash",  # two attentions a layer
    "qwen3_moe",
    "qwen3_next",  # linear attention
    "qwen3_vl_moe",  # a tower for images that nobody calls
    "zaya",  # routers hand a state on from layer to layer
    LOOKS_BACK,
    *OURS,  # moeut runs its layers twice
]
OTHERS = [name for name in COVERED if name not in FAMILIES and name != "switch_transformers"]


def check(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path / "model", family)
    expected = resident(folder)
    for hidden_memory in (IN_MEMORY, 0):
        scores, found = streamed(folder, hidden_memory=hidden_memory)
        assert scores == expected
        assert bool(found.hidden_bytes) == bool(hidden_memory)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_resident_ones(tmp_path: Path, family: str) -> None:
    check(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_scores_are_the_resident_ones_in_every_other_family(tmp_path: Path, family: str) -> None:
    check(tmp_path, family)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_so_they_are_in_half_precision(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path / "model", family)
    scores, _ = streamed(folder, dtype=torch.bfloat16)
    assert scores == resident(folder, torch.bfloat16)


def test_a_part_of_what_waits_may_be_in_memory(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt_oss")
    expected, whole = streamed(folder)
    scores, found = streamed(folder, hidden_memory=whole.hidden_bytes // 2)
    assert scores == expected
    assert whole.hidden_bytes // 4 < found.hidden_bytes <= whole.hidden_bytes // 2


def save_large(folder: Path, layers: int = 4, experts: int = 32, inner: int = 128) -> Path:
    """Save a model of a few megabytes, most of them in its experts."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=inner,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="5MB")
    return folder


def bytes_read() -> int:
    """What this process has read from files so far, whoever read it."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what processes read")
def test_every_byte_is_read_once(tmp_path: Path) -> None:
    folder = save_large(tmp_path)
    source = WeightSource.open(folder)
    head = ["lm_head.weight"]
    wanted = source.stored_bytes(set(source.names) - set(head))
    assert wanted > 25e6
    before = bytes_read()
    _, found = streamed(folder)
    assert found.read_bytes == wanted
    # Besides, headers and the configuration.
    assert wanted <= bytes_read() - before < wanted + 1e6


def test_neither_the_head_nor_a_tower_for_images_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, "qwen3_vl_moe")
    source = WeightSource.open(folder)
    unread = [name for name in source.names if "visual" in name or "lm_head" in name]
    _, found = streamed(folder)
    assert found.read_bytes == source.stored_bytes(set(source.names) - set(unread))


MEASURE = """
import ctypes, json, sys
from pathlib import Path
import torch
from esft.data.example import Example
from esft.moe import anatomy
from esft.streaming.streamed import run_streamed
from esft.tally import Tally
from esft.weight_source import WeightSource

def resident(line):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(line)[1].split()[0])

def measure(folder, tokens, hidden_memory):
    source = WeightSource.open(Path(folder))
    rows = torch.randint(64, (tokens,)).split(256)
    examples = [Example(row.tolist(), [True] * 256, "rows") for row in rows]
    tally = Tally(anatomy(source.model), examples, "all", cooccurrence=False)
    batches = list(tally.batches(512))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS:")
    found = run_streamed(source, tally, batches, device=torch.device("cpu"),
                         hidden_memory=hidden_memory)
    return [resident("VmHWM:") - before, found.hidden_bytes]

folder, tokens = sys.argv[1], int(sys.argv[2])
measure(folder, 512, 10**9)  # what is set up once
print(json.dumps([measure(folder, 512, 10**9), measure(folder, tokens, 10**9),
                  measure(folder, tokens, 0)]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux forgets a peak")
def test_memory_is_two_layers_and_what_waits(tmp_path: Path) -> None:
    """The peak of resident memory, above what the process has before, in a process of its own."""
    folder = save_large(tmp_path, layers=3, experts=64, inner=256)
    layer = 64 * 3 * 128 * 256 * 4
    tokens = 12 * 1024
    # Whatever is freed goes back at once: the allocator's own reserve, up to 64 MB, is no part of
    # what is measured.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = python_process("-c", MEASURE, folder, tokens, **at_once)
    assert done.returncode == 0, done.stderr
    (little, _), (in_memory, hidden), (in_file, nothing) = json.loads(done.stdout)
    states = tokens * 128 * 4
    # The embeddings, which the model's code keeps, the states, and ids.
    assert 2 * states < hidden < 2.05 * states
    assert nothing == 0
    print(layer, little, in_memory, hidden, in_file)  # shown where it fails
    computing = 0.35 * layer  # what one batch takes in a layer
    assert 1.2 * layer < little < 2 * layer + computing
    assert in_memory < 2 * layer + hidden + computing
    # The embeddings' pages, once read, are the system's to take back.
    assert in_file < 2 * layer + computing + 0.55 * hidden


def test_experts_in_two_lists_of_layers_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path, "switch_transformers")
    source = WeightSource.open(model)
    with pytest.raises(ModelError, match=r"experts are in 2 lists of layers.*--no-stream"):
        decoder_layers(source.model, moe_layers(source.model))

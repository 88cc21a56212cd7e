"""A streamed profile that is interrupted, killed, or runs into faults, and the one after it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from esft.errors import ModelError, OutputError
from esft.shards import open_checkpoint
from esft.streaming.partial import STATE, Partial
from tests.command import python_process
from tests.models import LAYERS
from tests.streaming.streams import (
    IN_MEMORY,
    LOOKS_BACK,
    Watching,
    interrupt,
    resident,
    save,
    streamed,
)

RESUMABLE = ["deepseek_v4", "gpt_oss", "minimax", "moeut", "qwen3_moe", "zaya"]


def stop_after(layers: int, folder: Path, partial: Path, **options: int) -> list[str]:
    """Interrupt a profile after some layers; return what it told."""
    watching = Watching(layers, interrupt)
    with pytest.raises(KeyboardInterrupt):
        streamed(folder, partial=partial, reporter=watching, **options)
    return watching.notes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "model", "qwen3_moe")


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "scores.json.partial"


@pytest.mark.parametrize("hidden_memory", [IN_MEMORY, 0])
@pytest.mark.parametrize("family", RESUMABLE)
def test_it_goes_on_after_the_last_finished_layer(
    tmp_path: Path, partial: Path, family: str, hidden_memory: int
) -> None:
    folder = save(tmp_path / "model", family)
    expected = resident(folder)
    notes = stop_after(1, folder, partial, hidden_memory=hidden_memory)
    assert notes == [
        f"{partial}: keeps the first 1 of {2 if family == 'moeut' else LAYERS} layers; the same "
        f"command goes on from there"
    ]
    stop_after(2, folder, partial, hidden_memory=hidden_memory)
    watching = Watching()
    scores, found = streamed(
        folder, partial=partial, hidden_memory=hidden_memory, reporter=watching
    )
    assert (found.skipped, watching.notes) == (2, [])
    assert scores == expected


def test_layers_that_are_done_are_not_read_again(model: Path, partial: Path) -> None:
    _, whole = streamed(model)
    stop_after(2, model, partial)
    _, found = streamed(model, partial=partial)
    layer = (whole.read_bytes - 64 * 32 * 2) / LAYERS  # but for embeddings and a norm
    assert found.read_bytes == pytest.approx(whole.read_bytes - 2 * layer, rel=0.01)


def test_a_family_that_looks_further_back_starts_again(tmp_path: Path, partial: Path) -> None:
    folder = save(tmp_path / "model", LOOKS_BACK)
    stop_after(2, folder, partial)
    watching = Watching()
    scores, found = streamed(folder, partial=partial, reporter=watching)
    assert found.skipped == 0
    assert scores == resident(folder)
    assert watching.notes == [
        f"{partial}: this family keeps more from layer to layer than could be saved; starting "
        f"from the first layer"
    ]


def test_another_profile_starts_again_and_says_why(model: Path, partial: Path) -> None:
    stop_after(2, model, partial)
    watching = Watching()
    scores, found = streamed(model, partial=partial, about="other", reporter=watching)
    assert found.skipped == 0
    assert scores == resident(model)
    (note,) = watching.notes
    assert note == (
        f"{partial}: it is of another profile (about differ); starting from the first layer"
    )


@pytest.mark.parametrize("damage", ["truncated", "gone", "not JSON", "no counts", "other things"])
def test_what_is_damaged_is_not_gone_on_from(model: Path, partial: Path, damage: str) -> None:
    stop_after(2, model, partial)
    state = json.loads((partial / STATE).read_text())
    states = partial / state["states"]
    if damage == "truncated":
        os.truncate(states, state["bytes"] - 1)
    elif damage == "gone":
        states.unlink()
    elif damage == "not JSON":
        (partial / STATE).write_text("{")
    elif damage == "no counts":
        (partial / state["counted"][0]).write_bytes(b"")
    else:
        (partial / STATE).write_text("[1]")
    watching = Watching()
    scores, found = streamed(model, partial=partial, reporter=watching)
    assert found.skipped == 0
    assert scores == resident(model)
    assert "starting from the first layer" in watching.notes[0]


def test_states_that_hold_something_else_are_not_gone_on_from(model: Path, partial: Path) -> None:
    stop_after(2, model, partial)
    states = partial / json.loads((partial / STATE).read_text())["states"]
    content = bytearray(states.read_bytes())
    content[1000] ^= 1
    states.write_bytes(content)
    scores, found = streamed(model, partial=partial)
    assert found.skipped == 0
    assert scores == resident(model)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.streaming.streams import Watching, streamed
stop = lambda: os.kill(os.getpid(), signal.SIGKILL)
streamed(Path(sys.argv[1]), partial=Path(sys.argv[2]), hidden_memory=int(sys.argv[3]),
         reporter=Watching(2, stop))
"""


@pytest.mark.slow
@pytest.mark.parametrize("hidden_memory", [IN_MEMORY, 0])
def test_a_killed_profile_goes_on(model: Path, partial: Path, hidden_memory: int) -> None:
    done = python_process("-c", KILLED, model, partial, hidden_memory)
    assert done.returncode == -9, done.stderr
    scores, found = streamed(model, partial=partial, hidden_memory=hidden_memory)
    # What the second layer left may have been on its way to the disk.
    assert found.skipped in (1, 2)
    assert scores == resident(model)
    assert not list(partial.glob("states-0001.bin"))


def shard_of_the_last_layer(folder: Path) -> Path:
    entries = open_checkpoint(folder).entries
    (file,) = {
        entry.file
        for name, entry in entries.items()
        if name == f"model.layers.{LAYERS - 1}.mlp.experts.7.up_proj.weight"
    }
    assert not any(
        "layers.0." in n or "layers.1." in n for n, e in entries.items() if e.file == file
    )
    return file


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_goes_bad_in_the_middle_is_named(
    model: Path, partial: Path, tmp_path: Path, damage: str
) -> None:
    shard, aside = shard_of_the_last_layer(model), tmp_path / "aside"

    def damaged() -> None:
        content = shard.read_bytes()
        os.rename(shard, aside)
        if damage == "truncated":
            shard.write_bytes(content[: len(content) // 2])

    watching = Watching(1, damaged)
    with pytest.raises(ModelError, match=re.escape(str(shard))):
        streamed(model, partial=partial, reporter=watching)
    (kept,) = watching.notes
    assert "keeps the first 2 of 3 layers" in kept
    os.rename(aside, shard)
    scores, found = streamed(model, partial=partial)
    assert found.skipped == 2
    assert scores == resident(model)


def fill_disk(partial: Path, file: str) -> None:
    """Let what is written to a file of the folder meet a full disk."""
    (partial / file).symlink_to("/dev/full")


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")


@full
def test_a_full_disk_under_what_waits_is_told(model: Path, partial: Path) -> None:
    stop_after(1, model, partial, hidden_memory=0)
    fill_disk(partial, "states-0002.bin")
    watching = Watching()
    with pytest.raises(
        OutputError,
        match=r"states-0002\.bin: no space left on the disk for what 4 batches hold between two "
        r"layers: 0 bytes are written, [\d,]+ more were to follow",
    ):
        streamed(model, partial=partial, hidden_memory=0, reporter=watching)
    assert "keeps the first 1 of 3 layers" in watching.notes[-1]
    assert not (partial / "states-0002.bin").is_symlink()
    scores, found = streamed(model, partial=partial, hidden_memory=0)
    assert found.skipped == 1
    assert scores == resident(model)


@full
def test_with_memory_enough_a_full_disk_costs_only_the_ability_to_go_on(
    model: Path, partial: Path
) -> None:
    stop_after(1, model, partial)
    fill_disk(partial, "states-0002.bin")
    watching = Watching()
    scores, _ = streamed(model, partial=partial, reporter=watching)
    assert scores == resident(model)
    (note,) = watching.notes
    assert "no space left on the disk" in note
    assert note.endswith("going on, but layers from here on are not saved")


def test_two_processes_do_not_write_one_folder(model: Path, partial: Path) -> None:
    with (
        Partial.opened(partial, {}),
        pytest.raises(OutputError, match=r"process \d+ .* has been writing this run"),
    ):
        streamed(model, partial=partial)


def test_nothing_is_left_in_the_temporary_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    streamed(model, hidden_memory=0)
    with pytest.raises(KeyboardInterrupt):
        streamed(model, hidden_memory=0, reporter=Watching(1, interrupt))
    assert not list((tmp_path / "temporary").iterdir())

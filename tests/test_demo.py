"""The demo, as `make demo` runs it: the shipped model learns a task that it did not know."""

from __future__ import annotations

import json

import pytest
from command import ROOT, esft, esft_process, python_process, refusal
from safetensors.torch import load_file

from esft.locating import TINY_MOE_FOLDER


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole demo in a process of its own: folder, and what `--json` printed."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    done = esft_process("demo", "--out", out, "--json", timeout=900)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_task_is_learnt_with_few_of_the_experts(demo):
    _, found, _ = demo
    assert found["before"]["exact_match"] < 0.10
    assert found["after"]["exact_match"] > 0.60
    assert found["share_of_expert_parameters"] <= 0.15


@pytest.mark.slow
def test_the_merged_checkpoint_differs_from_the_base_in_the_selected_experts_only(demo):
    out, found, _ = demo
    base = load_file(TINY_MOE_FOLDER / "model.safetensors")
    merged = load_file(out / "merged" / "model.safetensors")
    changed = {name for name in base if not base[name].equal(merged[name])}
    selection = json.loads((out / "selection.json").read_text())["experts"]
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in selection.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }
    assert sum(base[name].numel() for name in changed) == found["run"]["trained"]


@pytest.mark.slow
def test_every_step_is_told_with_its_command_and_leaves_its_files(demo):
    out, found, said = demo
    for verb in ("eval", "profile", "select", "train", "merge", "verify"):
        assert f"$ esft {verb} " in said
    for name in ("scores.json", "selection.json", "experts.png", "run/delta/esft_config.json"):
        assert (out / name).is_file()
    assert json.loads((out / "demo.json").read_text()) == found


def test_an_earlier_demo_is_replaced_and_anything_else_is_refused(tmp_path):
    out = tmp_path / "demo"
    for _ in range(2):
        assert esft("demo", "--out", out, "--steps", 1).returncode == 0
    (out / "thesis.txt").write_text("dear")
    assert "thesis.txt is not an earlier demo's" in refusal("demo", "--out", out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "demo.json").write_text('{"mine": 1}')
    assert "demo.json is not an earlier demo's" in refusal("demo", "--out", tmp_path / "mine")
    assert (out / "thesis.txt").read_text() == "dear"
    assert (tmp_path / "mine" / "demo.json").read_text() == '{"mine": 1}'


def test_an_unknown_task_is_refused_by_the_nearest_name(tmp_path):
    message = refusal("demo", "--out", tmp_path / "demo", "--task", "swedisch")
    assert 'did you mean "swedish"' in message
    assert not (tmp_path / "demo").exists()


def test_the_quickstart_runs_and_is_short(tmp_path):
    script = ROOT / "examples" / "quickstart.py"
    done = python_process(script, tmp_path / "out", 2)
    assert done.returncode == 0, done.stderr
    assert "before: exact match" in done.stdout
    assert "after: exact match" in done.stdout
    lines = [line for line in script.read_text().splitlines() if line.strip()]
    assert len(lines) < 40

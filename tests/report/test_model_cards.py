"""Model cards of deltas and merges, read as the hub reads them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import esft
from esft.files import write_json
from esft.manifest import MANIFEST
from esft.report.base_card import cell, describe_base, shown_path
from esft.run.result import RunResult
from tests.checkpoints import save_tiny

METHODS = ("esft", "random", "lora", "hot-lora", "full")
BASE_CARD = """\
---
license: other
license_name: tiny-licence
license_link: LICENSE
pipeline_tag: text-generation
tags: [not-ours]
---
# The base
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in a folder as the hub's client makes it: the hub has it, too."""
    place = tmp_path_factory.mktemp("private") / "models--owner--my-base" / "snapshots" / "0123abc"
    folder = save_tiny(place, "qwen3_moe")
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place")
    for first, name in ((0, "train.jsonl"), (12, "test|1.jsonl")):
        numbers = range(first, first + 12)
        rows = [{"prompt": f"{n}:", "completion": "abcdef"[n % 6]} for n in numbers]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunResult]:
    out = tmp_path_factory.mktemp("runs")
    made = {}
    for method in METHODS:
        recipe: dict[str, Any] = {
            "model": base,
            "method": method,
            "data": {
                "train": data / "train.jsonl",
                "test": data / "test|1.jsonl",
                "max_length": 32,
                "eval_rows": 2,
            },
            "evaluation": {"general": {"others": data / "train.jsonl"}},
            "training": {
                "max_steps": 2,
                "learning_rate": 0.01,
                "adam_beta2": 0.95,
                "weight_decay": 0.1,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
            },
        }
        if method not in ("lora", "full"):
            recipe["selection"] = {"top_n": 2, "tokens": 64}
        made[method] = esft.train(recipe, out / method)
    return made


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("method", METHODS)
def test_the_metadata_of_a_delta(runs: dict[str, RunResult], method: str) -> None:
    run = runs[method]
    found = card_of(run.delta).data
    assert found.library_name == ("peft" if method == "lora" else "esft")
    assert {"esft", "mixture-of-experts"} <= set(found.tags)
    assert "not-ours" not in found.tags
    assert found.pipeline_tag == "text-generation"
    assert (found.license, found.license_name) == ("other", "tiny-licence")
    assert found.license_link == "https://huggingface.co/owner/my-base/blob/main/LICENSE"
    assert found.base_model == "owner/my-base"
    relation = "finetune" if method == "full" else "adapter"
    assert found.to_dict()["base_model_relation"] == relation
    assert "datasets" not in found.to_dict()
    assert found.eval_results is not None
    (score,) = found.eval_results
    assert run.test is not None
    assert score.metric_type == "exact_match"
    assert score.metric_value == run.test.scores["exact_match"].value
    assert score.dataset_name == "test|1.jsonl"
    # What the hub's own check of a data set's type takes.
    assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", score.dataset_type)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_delta_s_card_tells(runs: dict[str, RunResult], data: Path, method: str) -> None:
    run = runs[method]
    text = card_of(run.delta).text
    assert f"{run.trained:,} parameters trained" in text
    for name in ("train.jsonl", "test|1.jsonl"):
        digest = hashlib.sha256((data / name).read_bytes()).hexdigest()
        assert f"{cell(name)} (sha256 {digest})" in text
    for row in (
        "| validation data | 2 of the training rows, set aside |",
        "| steps | 2 |",
        "| batch | 4 (2 times 2) |",
        "| learning rate | 0.01, constant |",
        "betas 0.9 and 0.95, weight decay 0.1 |",
    ):
        assert row in text
    assert run.test is not None
    assert run.general is not None
    score = run.test.scores["exact_match"]
    assert f"| {score.value:.4g} | {score.low:.4g} to {score.high:.4g} | 12 |" in text
    assert f"| loss on other text: others | {run.general['others']:.4f} |" in text
    assert "transformers 5." in text
    selection = run.out / "selection.json"
    assert selection.exists() == ("## Experts" in text)
    if selection.exists():
        for layer, ids in json.loads(selection.read_text())["experts"].items():
            assert f"| {layer} | {', '.join(map(str, ids))} |" in text


@pytest.mark.parametrize("method", METHODS)
def test_nothing_private_is_told(
    runs: dict[str, RunResult], base: Path, data: Path, method: str
) -> None:
    text = (runs[method].delta / "README.md").read_text()
    for folder in (base.parent, data, runs[method].out, Path.home()):
        assert str(folder) not in text
    assert "{{" not in text


@pytest.mark.parametrize("method", METHODS)
def test_the_snippets_of_a_card_run(
    runs: dict[str, RunResult],
    base: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also: a card in its folder disturbs no check of the delta."""
    from tests.command import esft as command

    monkeypatch.chdir(tmp_path)
    text = card_of(runs[method].delta).text
    (shell,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    places = {"owner/my-base": str(base), "DELTA": str(runs[method].delta), "MERGED": "merged"}
    words = [places.get(word, word) for word in shell.split()]
    assert words[0] == "esft"
    result = command(*words[1:])
    assert result.returncode == 0, result.stderr
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == (1 if method in ("hot-lora", "full") else 2)
    for snippet in snippets:
        for word, place in places.items():
            snippet = snippet.replace(f'"{word}"', repr(place))
        exec(snippet, {})
    esft.verify(base, runs[method].delta)


def test_a_merge_s_card(runs: dict[str, RunResult], base: Path, tmp_path: Path) -> None:
    deltas = [runs["esft"].delta, runs["random"].delta]
    # The base is called what it was called when the deltas were made.
    shutil.copytree(base, tmp_path / "elsewhere")
    merged = esft.merge(tmp_path / "elsewhere", deltas, tmp_path / "merged", on_conflict="last")
    card = card_of(merged)
    assert card.data.library_name == "transformers"
    assert card.data.license == "other"
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == (
        "owner/my-base",
        "finetune",
    )
    assert "# owner/my-base, specialised" in card.text
    assert "and 2 deltas" in card.text
    for method in ("esft", "random"):
        assert f"| delta | {method} | 6 in 3 layers | 2 | train.jsonl | esft 0." in card.text
    assert str(base.parent) not in merged.joinpath("README.md").read_text()
    assert "# The base" not in card.text


def test_a_foreign_manifest_cannot_break_a_merge_s_card(
    runs: dict[str, RunResult], base: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    shutil.copytree(runs["esft"].delta, delta)
    manifest = json.loads((delta / MANIFEST).read_text())
    strange = {"recipe": 3, "training": [1], "versions": "x", "selection": {"experts": [2]}}
    manifest |= strange | {"method": "esft |\n---\nlicense: mine\n---\n"}
    manifest["base"] |= {"name": "a\n---\nlicense: mine", "architecture": ["x"]}
    write_json(delta / MANIFEST, manifest)
    card = card_of(esft.merge(base, delta, tmp_path / "merged"))
    assert card.data.license == "other"
    assert "\n---\n" not in card.text


def test_an_export_keeps_the_card(runs: dict[str, RunResult], tmp_path: Path) -> None:
    esft.export(runs["esft"].delta, tmp_path / "again")
    card = (runs["esft"].delta / "README.md").read_bytes()
    assert (tmp_path / "again" / "README.md").read_bytes() == card


CACHED = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-30B-A3B/snapshots/0123abcd"


@pytest.mark.parametrize("model", ["Qwen/Qwen3-30B-A3B", CACHED])
def test_a_base_of_the_hub_is_named_by_its_id(model: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(BASE_CARD)
    about = describe_base(model, tmp_path, "Qwen3MoeForCausalLM")
    assert about.name == about.argument == "Qwen/Qwen3-30B-A3B"
    assert about.metadata("adapter") == {
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "https://huggingface.co/Qwen/Qwen3-30B-A3B/blob/main/LICENSE",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-30B-A3B",
        "base_model_relation": "adapter",
    }


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "no front matter",
        "---\n- a list\n---\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: b}\npipeline_tag: 3\n---\n",
        "---\nlicense_name: without one\n---\n",
        "---\nlicense: !!python/object/apply:os.system [true]\n---\n",
        "---\nlicense: " + "x" * 400 + "\n---\n",
        b"---\nlicense: \xff\n---\n",
    ],
)
def test_a_base_s_card_that_says_nothing_useful(card: str | bytes | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    about = describe_base("owner/name", tmp_path, "LlavaForConditionalGeneration")
    wanted = {"base_model": "owner/name", "base_model_relation": "finetune"}
    assert about.metadata("finetune") == wanted


def test_what_is_shown_of_a_path() -> None:
    shipped = Path(esft.__file__).parent / "tiny_moe" / "tasks" / "dates" / "train.jsonl"
    assert shown_path(str(shipped)) == "tiny-moe:tasks/dates/train.jsonl"
    assert shown_path("/home/me/rows.jsonl") == "rows.jsonl"
    assert shown_path("owner/name") == "owner/name"
    folder = describe_base("/home/me/base", None, "QwenForCausalLM")
    assert (folder.name, folder.argument) == ("base", "BASE")
    # A folder is no place that others could look for the base in.
    assert folder.metadata("adapter") == {"pipeline_tag": "text-generation"}
    assert describe_base("tiny-moe", None, None).argument == "tiny-moe"
    assert yaml.safe_load(cell("a")) == "a"
    assert cell("a|b\n`c`\\") == "a\\|b \\`c\\`\\\\"

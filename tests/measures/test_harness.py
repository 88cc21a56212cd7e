"""The lm-evaluation-harness on our models, against plain transformers and a loop.

All but the first tests need lm-eval, which is an extra of its own (some 340 MB with what it asks
for): `pip install 'esft[harness]'`.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esft.errors import DataError, EsftError
from esft.locating import resolve
from esft.measures.harness import evaluate_harness
from tests.command import esft, esft_json, refusal
from tests.deltas import train_delta

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs the extra harness: pip install 'esft[harness]'"
)

ROWS = [
    {"text": "The cat sat on the", "choices": [" mat", " xylophone", " of"], "answer": 0},
    {"text": "Once upon a", "choices": [" time", " the", " zebra"], "answer": 0},
    {"text": "He went to", "choices": [" the", " of", " and"], "answer": 1},
    {"text": "She was very", "choices": [" a", " sad", " it"], "answer": 1},
    {"text": "one, two,", "choices": [" three", " was", " house"], "answer": 0},
]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
LIKELIHOOD = """\
task: local_likelihood
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
FROM_THE_HUB = """\
task: from_the_hub
dataset_path: nobody/no-such-set
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choice.yaml").write_text(CHOICE.format(rows=rows))
    (folder / "likelihood.yaml").write_text(LIKELIHOOD.format(rows=rows))
    (folder / "hub.yaml").write_text(FROM_THE_HUB)
    return folder


def _log_likelihood(model: Any, tokenizer: Any, text: str, answer: str) -> tuple[float, bool]:
    """Return the answer's log-likelihood after the text, and whether it is the greedy one."""
    before, both = tokenizer(text)["input_ids"], tokenizer(text + answer)["input_ids"]
    assert both[: len(before)] == before
    with torch.no_grad():
        log_p = model(torch.tensor([both])).logits[0].double().log_softmax(dim=-1)
    places = range(len(before), len(both))
    total = sum(log_p[place - 1, both[place]].item() for place in places)
    return total, all(log_p[place - 1].argmax() == both[place] for place in places)


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    folder = resolve("tiny-moe")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not there
    found = refusal("eval", "tiny-moe", "--harness", "arc_easy")
    assert found == (
        "error: --harness: lm-eval is not installed; pip install 'esft[harness]' (lm-eval)"
    )


@pytest.mark.parametrize("options", [{"batch_tokens": 0}, {"max_rows": 0}])
def test_numbers_out_of_range_are_refused_first(options: dict[str, int]) -> None:
    with pytest.raises(EsftError, match=r"--(batch-tokens|max-rows) 0: expected at least 1"):
        evaluate_harness("no-such-model", ["arc_easy"], **options)


@pytest.mark.parametrize("options", [[], ["--data", "x.jsonl", "--harness", "arc_easy"]])
def test_eval_takes_rows_or_tasks(options: list[str]) -> None:
    result = esft("eval", "tiny-moe", *options)
    assert result.returncode == 2
    assert "give --data or --harness" in result.stderr


@needs_lm_eval
def test_scores_are_those_of_plain_transformers(
    tasks: Path, tmp_path: Path, plain: tuple[Any, Any]
) -> None:
    out = tmp_path / "found.json"
    found = esft_json(
        *("eval", "tiny-moe", "--harness", "local_choice, local_likelihood"),
        *("--harness-path", tasks, "--out", out),
    )
    assert json.loads(out.read_text()) == found

    values = {(score["task"], score["metric"]): score["value"] for score in found["scores"]}
    likelihoods = [
        [_log_likelihood(*plain, row["text"], choice) for choice in row["choices"]] for row in ROWS
    ]
    best = [max(range(3), key=lambda n, row=row: row[n][0]) for row in likelihoods]
    right = sum(n == row["answer"] for n, row in zip(best, ROWS, strict=True))
    assert 0 < right < len(ROWS)  # or it would prove little
    assert values["local_choice", "acc"] == right / len(ROWS)
    answers = [found[row["answer"]] for found, row in zip(likelihoods, ROWS, strict=True)]
    mean = sum(total for total, _ in answers) / len(ROWS)
    # The harness sums up in float32.
    assert values["local_likelihood", "perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    greedy = sum(is_greedy for _, is_greedy in answers)
    assert values["local_likelihood", "acc"] == greedy / len(ROWS)
    assert found["rows"] == {"local_choice": 5, "local_likelihood": 5}


@needs_lm_eval
def test_the_first_rows_and_a_delta(tasks: Path, tmp_path: Path, plain: tuple[Any, Any]) -> None:
    """With a delta it is the trained model that is scored."""
    base = resolve("tiny-moe")
    trained = train_delta(base, tmp_path / "delta").float()
    found = evaluate_harness(
        base, ["local_likelihood"], path=tasks, delta=tmp_path / "delta", max_rows=2
    )
    values = {score.metric: score.value for score in found.scores}
    likelihoods = [
        _log_likelihood(trained, plain[1], row["text"], row["choices"][row["answer"]])[0]
        for row in ROWS[:2]
    ]
    assert values["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / 2), rel=1e-4)
    assert found.rows == {"local_likelihood": 2}
    unchanged = [
        _log_likelihood(*plain, row["text"], row["choices"][row["answer"]])[0] for row in ROWS[:2]
    ]
    assert abs(sum(unchanged) - sum(likelihoods)) > 0.002  # ten times that tolerance


@needs_lm_eval
def test_a_table_without_json(tasks: Path) -> None:
    result = esft("eval", "tiny-moe", "--harness", "local_choice", "--harness-path", tasks)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("lm-eval ")
    task, metric, value, error, rows = lines[-1].split()
    assert (task, metric, rows) == ("local_choice", "acc", "5")
    assert 0 < float(value) < 1
    # The standard error of a mean of 0s and 1s.
    p = float(value)
    assert float(error) == pytest.approx(math.sqrt(p * (1 - p) / 4), abs=1e-4)


@needs_lm_eval
def test_data_from_the_network_that_are_not_there(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as found:
        evaluate_harness("tiny-moe", ["from_the_hub"], path=tasks)
    assert str(found.value).startswith("--harness from_the_hub: cannot load the task's data: ")
    assert "nobody/no-such-set" in str(found.value)
    assert "without network give tasks whose data are local files" in str(found.value)


@needs_lm_eval
@pytest.mark.slow
def test_unknown_tasks_are_refused_with_the_nearest(tasks: Path) -> None:
    """Slow: the harness looks through all of its own tasks."""
    with pytest.raises(
        DataError, match=r'no task local_choise or in .*; did you mean "local_choice"'
    ):
        evaluate_harness("tiny-moe", ["local_choise"], path=tasks)


@needs_lm_eval
def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        evaluate_harness("tiny-moe", ["local_choice"], path=tmp_path / "gone")

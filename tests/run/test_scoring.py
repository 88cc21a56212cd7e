"""What a run is scored by, from outside: its files against a second reading of the model."""

import json
import math
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import esft
from esft.data.encode import encode_rows
from esft.data.rows import read_rows
from esft.errors import DataError, EsftError, RecipeError
from esft.evaluation import evaluate_model
from esft.inference import load
from esft.recipe import make_recipe, read_recipe
from esft.run.clock import Clock
from tests.checkpoints import save_tiny
from tests.notes import Notes


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(start: int, rows: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}:", "completion": str(n % 3) * 2} for n in range(start, start + rows)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows to learn, to be scored on meanwhile and afterwards, and two other domains."""
    path = tmp_path_factory.mktemp("scoring")
    save_tiny(path / "base")
    write(path / "train.jsonl", *pairs(0, 12))
    write(path / "eval.jsonl", *pairs(100, 5))
    write(path / "test.jsonl", *pairs(200, 7))
    write(path / "general" / "prose.jsonl", {"text": "Once upon a time"}, {"text": "there was"})
    write(
        path / "general" / "sums.jsonl", *[{"prompt": f"{n}+1=", "completion": "7"} for n in "12"]
    )
    (path / "general" / "README.md").write_text("no domain")
    return path


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    training = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 2,
        **changes.pop("training", {}),
    }
    evaluation = {
        "metrics": ["exact_match", "chrf"],
        "max_new_tokens": 4,
        "general": str(folder / "general"),
        **changes.pop("evaluation", {}),
    }
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval", "test")}
    return {
        "model": str(folder / "base"),
        "data": data | {"max_length": 32, "packing": False} | changes.pop("data", {}),
        "evaluation": evaluation,
        "training": training,
        "routing_drift": False,
        **changes,
    }


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[Path, Any]:
    return folder / "run", esft.train(recipe(folder), folder / "run")


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_evaluation_logs_every_metric_and_domain(run: tuple[Path, Any], folder: Path) -> None:
    lines = [line for line in logged(run[0]) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        general = {"eval_general_prose_loss", "eval_general_sums_loss"}
        assert {name for name in line if name.startswith("eval_")} == general | {
            "eval_loss",
            "eval_exact_match",
            "eval_chrf",
            "eval_perplexity",
            "eval_general_loss",
        }
        assert line["eval_general_loss"] == pytest.approx(sum(line[name] for name in general) / 2)
        assert 0 <= line["eval_chrf"] <= 1
    # Step 0 is the base, the last one what the delta makes of it.
    for line, delta in ((lines[0], None), (lines[-1], folder / "run" / "delta")):
        model, tokenizer = load(folder / "base", delta=delta)
        for name in ("prose", "sums"):
            rows = read_rows(folder / "general" / f"{name}.jsonl")
            found = evaluate_model(model, encode_rows(rows, tokenizer))
            assert line[f"eval_general_{name}_loss"] == pytest.approx(found.loss, abs=1e-5)


def test_the_result_is_what_a_second_scoring_finds(run: tuple[Path, Any], folder: Path) -> None:
    written = json.loads((run[0] / "result.json").read_text())
    assert written == json.loads(json.dumps(run[1].to_dict()))
    found = esft.evaluate(folder / "base", folder / "test.jsonl", delta=run[0] / "delta")
    test = written["test"]
    assert (test["rows"], test["tokens"], test["matched"]) == (7, found.tokens, found.matched)
    assert test["loss"] == pytest.approx(found.loss, abs=1e-6)
    assert list(test["scores"]) == ["exact_match", "chrf"]
    assert test["scores"]["exact_match"]["value"] == pytest.approx(found.exact_match)
    for score in test["scores"].values():
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    last = [line for line in logged(run[0]) if "eval_loss" in line][-1]
    assert written["general"] == pytest.approx(
        {name: last[f"eval_general_{name}_loss"] for name in ("prose", "sums")}
    )
    assert 0 < written["step_seconds"] < written["seconds"]


def test_each_test_row_is_told(run: tuple[Path, Any], folder: Path) -> None:
    rows = [json.loads(line) for line in (run[0] / "test.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rows] == [f"{folder / 'test.jsonl'}:{n}" for n in range(1, 8)]
    test = run[1].test
    assert sum(row["matched"] for row in rows) == test.matched
    assert math.fsum(row["loss"] for row in rows) / test.tokens == pytest.approx(test.loss)
    # An answer that matches exactly is the reference, to the end.
    for row, given in zip(rows, pairs(200, 7), strict=True):
        assert isinstance(row["answer"], str)
        assert row["matched"] == (row["answer"] == given["completion"] and row["loss"] < 99)
        assert row["scores"]["exact_match"] == float(row["matched"])


def test_a_run_without_a_result_is_not_finished(folder: Path, run: tuple[Path, Any]) -> None:
    """Ended while its files were written: it is scored again, from the last checkpoint."""
    again = folder / "again"
    shutil.copytree(run[0], again)
    with pytest.raises(EsftError, match="this run is complete"):
        esft.train(recipe(folder), again, resume=True)
    (again / "result.json").unlink()
    (again / "test.jsonl").unlink()
    esft.train(recipe(folder), again, resume=True)
    for name in ("test.jsonl", "delta/esft_delta.safetensors"):
        assert (again / name).read_bytes() == (run[0] / name).read_bytes()
    written = [json.loads((place / "result.json").read_text()) for place in (again, run[0])]
    for key in ("test", "general", "evaluation", "steps", "trained"):
        assert written[0][key] == written[1][key]
    # The steps were done before.
    assert written[0]["step_seconds"] == written[1]["step_seconds"]
    assert written[0]["seconds"] == pytest.approx(written[1]["seconds"], rel=0.5)


def test_limits(folder: Path, tmp_path: Path) -> None:
    wanted = recipe(
        folder,
        evaluation={"metrics": ["exact_match"], "max_rows": 3, "general_max_rows": 1},
        training={"eval_strategy": "no", "eval_on_start": False, "max_steps": 1},
    )
    result = esft.train(wanted, tmp_path / "run")
    assert result.test is not None
    assert result.test.rows == result.evaluation.rows == 3  # type: ignore[union-attr]
    model, tokenizer = load(folder / "base", delta=tmp_path / "run" / "delta")
    first = read_rows(folder / "general" / "prose.jsonl")[:1]
    expected = evaluate_model(model, encode_rows(first, tokenizer)).loss
    assert result.general is not None
    assert result.general["prose"] == pytest.approx(expected, abs=1e-5)


def test_the_best_step_by_what_is_kept_of_another_domain(folder: Path, tmp_path: Path) -> None:
    wanted = recipe(
        folder,
        training={
            "metric_for_best_model": "general_prose_loss",
            "load_best_model_at_end": True,
            "eval_on_start": False,
            "eval_steps": 1,
            "save_steps": 1,
            "max_steps": 8,
            "learning_rate": 5e-2,
        },
        evaluation={"metrics": ["exact_match"]},
        early_stopping={"patience": 2},
    )
    result = esft.train(wanted, tmp_path / "run")
    losses = {
        line["step"]: line["eval_general_prose_loss"]
        for line in logged(tmp_path / "run")
        if "eval_loss" in line
    }
    best = min(losses, key=lambda step: losses[step])
    assert result.steps == max(losses) == best + 2 < 8
    assert result.best_step == best
    assert result.general is not None
    assert result.general["prose"] == pytest.approx(losses[best], abs=1e-5)


def test_names_of_metrics_are_checked(folder: Path) -> None:
    def made(metric: str, **changes: Any) -> None:
        make_recipe(recipe(folder, training={"metric_for_best_model": metric}, **changes))

    for metric in ("chrf", "eval_general_loss", "general_sums_loss"):
        made(metric)
    with pytest.raises(RecipeError, match=r'general_sum_loss; did you mean "eval_general_sums_l'):
        made("general_sum_loss")
    with pytest.raises(RecipeError, match=r"no metric is called bleu; .*eval_chrf"):
        made("bleu")
    named = {"general": {"code": str(folder / "general" / "prose.jsonl")}}
    made("general_code_loss", evaluation=named)
    with pytest.raises(RecipeError, match="no metric is called general_prose_loss"):
        made("general_prose_loss", evaluation=named)


def test_paths_are_relative_to_the_recipe(folder: Path) -> None:
    text = "model: base\ndata: {train: train.jsonl, test: test.jsonl}\nevaluation: {general: %s}\n"
    file = folder / "recipe.yaml"
    file.write_text(text % "general")
    made = read_recipe(file)
    assert made.data.test == str(folder / "test.jsonl")
    assert made.evaluation.general == str(folder / "general")
    file.write_text(text % "{a: general/prose.jsonl, b: {path: general/sums.jsonl}}")
    general = read_recipe(file).evaluation.general
    assert isinstance(general, dict)
    assert general["a"] == str(folder / "general" / "prose.jsonl")
    assert general["b"].path == str(folder / "general" / "sums.jsonl")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"metric": ["chrf"]}, r'evaluation\.metric: unknown key; did you mean "metrics"\?'),
        ({"metrics": ["rouge"]}, r"evaluation\.metrics\.0: input should be 'exact_match', "),
        ({"metrics": []}, r"evaluation\.metrics: .*at least 1"),
        ({"max_rows": 0}, r"evaluation\.max_rows: .*greater than 0"),
        ({"general": {"a": {"pth": "x"}}}, r'general\.a\.pth: unknown key; did you mean "path"'),
    ],
)
def test_a_wrong_key_is_named(folder: Path, evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(recipe(folder, evaluation=evaluation))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"general": "nowhere"}, "nowhere: no such folder of domains"),
        ({"metrics": ["rouge_l"]}, None),
        ({"metrics": ["pass_at_1"]}, "pass_at_1 runs code that the model writes"),
        ({"metrics": ["pass_at_1"], "allow_code": True}, "eval.jsonl:1: pass_at_1: the row has no"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_work(
    folder: Path, tmp_path: Path, evaluation: dict[str, Any], message: str | None
) -> None:
    if message is None:  # rows of plain text have no prompt
        wanted = recipe(
            folder, evaluation=evaluation, data={"test": str(folder / "general" / "prose.jsonl")}
        )
        message = r"prose\.jsonl:1: the row has no prompt"
    else:
        wanted = recipe(folder, evaluation=evaluation)
    with pytest.raises(EsftError, match=message):
        esft.train(wanted, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_two_files_of_one_name_are_no_two_domains(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "general", tmp_path / "general")
    write(tmp_path / "general" / "prose.json", {"text": "a"})
    wanted = recipe(folder, evaluation={"general": str(tmp_path / "general")})
    with pytest.raises(DataError, match=r"prose\.jsonl: .*prose\.json is the domain prose already"):
        esft.train(wanted, tmp_path / "run")


def test_test_rows_that_are_training_rows_are_told(folder: Path, tmp_path: Path) -> None:
    told = Notes()
    wanted = recipe(folder, data={"test": str(folder / "train.jsonl")}, evaluation={"max_rows": 2})
    wanted["training"] |= {"max_steps": 1, "eval_strategy": "no", "eval_on_start": False}
    esft.train(wanted, tmp_path / "run", reporter=told)
    assert any(note.startswith("2 of 2 rows of data.test are in data.train") for note in told.notes)


def test_other_rows_to_score_are_another_run(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    moved = write(tmp_path / "moved.jsonl", *pairs(200, 7))
    esft.train(recipe(folder, data={"test": str(moved)}), tmp_path / "run", resume=True)
    (tmp_path / "run" / "result.json").unlink()
    write(moved, *pairs(300, 7))
    with pytest.raises(EsftError, match=r"data\.test: \w+… then, \w+… now \(.*moved\.jsonl\)"):
        esft.train(recipe(folder, data={"test": str(moved)}), tmp_path / "run", resume=True)
    general = shutil.copytree(folder / "general", tmp_path / "general")
    write(general / "prose.jsonl", {"text": "other"})
    with pytest.raises(EsftError, match=r"general\.prose: \w+… then"):
        esft.train(
            recipe(folder, evaluation={"general": str(general)}), tmp_path / "run", resume=True
        )


def test_the_clock_counts_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()  # a second passes whenever the clock is read
    monkeypatch.setattr("esft.run.clock.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    clock = Clock()
    clock.start()
    before = clock.train_seconds
    with clock.paused():
        for _ in range(50):
            assert clock.seconds
    assert clock.train_seconds - before < 10
    assert clock.seconds > 50
    assert clock.step_seconds is None


def test_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("esft.run.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    clock, nothing = Clock(), (None, None, None)
    clock.start()
    now[0] = 100.0  # of preparation
    clock.on_train_begin(*nothing)  # type: ignore[arg-type]
    for took in (5.0, 1.0, 2.0):
        now[0] += took
        clock.on_step_end(*nothing)  # type: ignore[arg-type]
        with clock.paused():
            now[0] += 1000
    assert clock.step_seconds == 2.0
    state = json.loads(json.dumps(clock.state()))
    assert (clock.seconds, clock.train_seconds) == (3108.0, 108.0)
    # Another process goes on.
    now[0] = 7.0
    after = Clock()
    after.start(state)
    now[0] += 3
    assert (after.seconds, after.train_seconds) == (3111.0, 111.0)
    assert after.step_seconds == 2.0


@pytest.mark.parametrize("method", ["lora", "hot-lora", "full"])
def test_every_method_answers_as_its_merged_model_does(
    folder: Path, tmp_path: Path, method: str
) -> None:
    """While layers are computed again, too, where a model keeps no keys and values in training."""
    wanted = recipe(folder, method=method, evaluation={"metrics": ["chrf"]})
    wanted["training"] |= {"max_steps": 2, "gradient_checkpointing": True, "eval_on_start": False}
    result = esft.train(wanted, tmp_path / "run")
    esft.merge(folder / "base", tmp_path / "run" / "delta", tmp_path / "merged")
    found = esft.evaluate(
        tmp_path / "merged", folder / "test.jsonl", metrics=["chrf"], max_new_tokens=4
    )
    assert result.test is not None
    assert [row["answer"] for row in result.test.answers] == [
        row["answer"] for row in found.answers
    ]
    assert result.test.scores["chrf"].value == pytest.approx(found.scores["chrf"].value)

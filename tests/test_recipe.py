"""Recipes: what is read from YAML and options, and what every mistake is told as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from esft.comparison.runs import Planner
from esft.comparison.spec import as_compare_recipe
from esft.errors import EsftError, RecipeError
from esft.locating import TINY_MOE_FOLDER
from esft.recipe import (
    DataSpec,
    Recipe,
    SelectionSpec,
    SourceSpec,
    make_recipe,
    read_recipe,
    recipe_from_options,
)
from esft.recipe_text import Override

FULL = """\
model: tiny-moe
method: esft
selection: {metric: gate, p: 0.3, tokens: 1000}
data:
  train: train.jsonl
  eval: sets/test.jsonl
  max_length: 64
training:
  max_steps: 20
  learning_rate: 1e-3
  lr_scheduler_type: cosine
  lr_scheduler_kwargs: {num_cycles: 0.4}
"""
MINIMAL: dict[str, Any] = {"model": "m", "data": {"train": "t.jsonl"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    return tmp_path / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str | Override) -> str:
    """Return why a recipe is refused, less the folder; it must be one line."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{path.parent}/", "")


def test_a_whole_recipe(folder: Path) -> None:
    recipe = read_recipe(write(folder, FULL))
    assert recipe == Recipe(
        model="tiny-moe",
        method="esft",
        selection=SelectionSpec(metric="gate", p=0.3, tokens=1000),
        data=DataSpec(
            train=str(folder / "train.jsonl"),
            eval=str(folder / "sets" / "test.jsonl"),
            max_length=64,
        ),
        training={
            "max_steps": 20,
            "learning_rate": 0.001,
            "lr_scheduler_type": "cosine",
            "lr_scheduler_kwargs": {"num_cycles": 0.4},
        },
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        ("+2e3", 2000.0),
        (".5e-1", 0.05),
        ("1.e-2", 0.01),
        ("1.0e-3", 0.001),
        ("3", 3.0),
        ("'1e-3'", 0.001),
    ],
)
def test_numbers_with_an_exponent_are_numbers(folder: Path, text: str, value: float) -> None:
    path = write(folder, FULL.replace("1e-3", text))
    assert read_recipe(path).training["learning_rate"] == value
    found = read_recipe(path, [f"training.learning_rate={text}"])
    assert found.training["learning_rate"] == value


@pytest.mark.parametrize("word", ["no", "NO", "off"])
def test_no_is_a_word(folder: Path, word: str) -> None:
    """YAML 1.1 would make it false, which is no strategy."""
    found = read_recipe(write(folder, FULL), [f"training.run_name={word}"])
    assert found.training["run_name"] == word
    assert read_recipe(write(folder, FULL), ["training.save_strategy=no"])
    # A reader that speaks YAML 1.1 gets the same.
    assert yaml.safe_load(found.to_yaml())["training"]["run_name"] == word


def test_a_recipe_survives_being_written(folder: Path) -> None:
    recipe = read_recipe(write(folder, FULL))
    again = folder / "elsewhere"
    again.mkdir()
    assert read_recipe(write(again, recipe.to_yaml())) == recipe
    # Text that YAML would read as something else, and letters beyond ASCII.
    for name in ("1e-3", "1e5", "true", "2024-01-02", "null", "ü", "a: b", "0x1f", "~"):
        odd = make_recipe(MINIMAL | {"training": {"run_name": name}, "model": f"/{name}"})
        assert read_recipe(write(again, odd.to_yaml())) == odd
        assert odd.training["run_name"] == name
    lora = make_recipe(MINIMAL | {"method": "lora", "lora": {"target_modules": ["q", "v"]}})
    assert read_recipe(write(again, lora.to_yaml())) == lora


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model:", "modell:", 'recipe.yaml:1: modell: unknown key; did you mean "model"?'),
        (
            "  max_length:",
            "  max_len:",
            'recipe.yaml:7: data.max_len: unknown key; did you mean "max_length"?',
        ),
        (
            "metric: gate",
            "metrics: gate",
            'recipe.yaml:3: selection.metrics: unknown key; did you mean "metric"?',
        ),
        (
            "  max_steps:",
            "  max_step:",
            'recipe.yaml:9: training.max_step: unknown key; did you mean "max_steps"?',
        ),
        (
            "  max_steps:",
            "  xyz:",
            "recipe.yaml:9: training.xyz: unknown key; training takes the fields of "
            "TrainingArguments",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_line_and_the_nearest(
    folder: Path, old: str, new: str, message: str
) -> None:
    assert refused(write(folder, FULL.replace(old, new, 1))) == message


@pytest.mark.parametrize(
    ("old", "new", "start"),
    [
        ("max_length: 64", "max_length: long", "recipe.yaml:7: data.max_length: "),
        ("max_length: 64", "max_length: 1", "recipe.yaml:7: data.max_length: "),
        ("max_length: 64", "packing: 2", "recipe.yaml:7: data.packing: "),
        ("max_length: 64", "loss_on: prompt", "recipe.yaml:7: data.loss_on: "),
        ("max_length: 64", "truncation: keep_start", "recipe.yaml:7: data.truncation: "),
        (
            "max_length: 64",
            "last_turn_only: true\n  loss_on: all",
            "recipe.yaml:7: data.last_turn_only: says to learn the last turn",
        ),
        (
            "max_steps: 20",
            "train_sampling_strategy: group_by_length",
            "recipe.yaml:9: training.train_sampling_strategy: packed blocks are all of one length",
        ),
        ("method: esft", "method: esf", "recipe.yaml:2: method: input should be 'esft'"),
        ("model: tiny-moe", "model: 7", "recipe.yaml:1: model: "),
        ("max_steps: 20", "max_steps: many", "recipe.yaml:9: training.max_steps: "),
        ("max_steps: 20", "max_steps: 2.5", "recipe.yaml:9: training.max_steps: "),
        ("max_steps: 20", "bf16: maybe", "recipe.yaml:9: training.bf16: "),
        ("1e-3", ".nan", "recipe.yaml:10: training.learning_rate: must be finite"),
        ("1e-3", "0", "recipe.yaml:10: training.learning_rate: must be above 0"),
        ("max_steps: 20", "per_device_train_batch_size: 0", "recipe.yaml:9: training.per_device"),
        ("max_steps: 20", "run_name: !!binary aGk=", "recipe.yaml:9: training.run_name: not text"),
        ("{metric: gate, p: 0.3, tokens: 1000}", "[1, 2]", "recipe.yaml:3: selection: expected"),
        ("{metric: gate, p: 0.3, tokens: 1000}", "{1: 2}", "recipe.yaml:3: selection.1: keys"),
        ("tokens: 1000", "tokens: 0", "recipe.yaml:3: selection.tokens: "),
        ("  train: train.jsonl\n", "", "recipe.yaml:4: data: the key data.train is missing"),
        ("model: tiny-moe\n", "", "recipe.yaml:1: the key model is missing"),
        ("method: esft", "lora: {r: 4}", "recipe.yaml:2: lora: is for the methods lora"),
        ("method: esft", "method: lora", "recipe.yaml:3: selection: method lora trains no"),
        ("method: esft", "dtype: int4", "recipe.yaml:2: dtype: input should be 'auto'"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(folder: Path, old: str, new: str, start: str) -> None:
    assert refused(write(folder, FULL.replace(old, new, 1))).startswith(start)


def test_a_nested_value_of_the_wrong_kind(folder: Path) -> None:
    path = write(folder, "model: m\ndata: train.jsonl\n")
    assert refused(path) == "recipe.yaml:2: data: expected a mapping of keys (got 'train.jsonl')"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("p: 0", "selection.p: p must be above 0 and at most 1 (it is 0.0)"),
        ("p: 1.5", "selection.p: p must be above 0 and at most 1 (it is 1.5)"),
        ("p: -0.1", "selection.p: p must be above 0 and at most 1 (it is -0.1)"),
        ("p: true", "selection.p: input should be a valid number (got True)"),
        ("p: 0.2, top_n: 3", "selection.p: p and top_n contradict each other; give one of them"),
        ("top_n: 0", "selection.top_n: top_n must be a whole number, at least 1 (it is 0)"),
        ("budget: 0%", "selection.budget: budget 0%: must be above 0 and at most 100%"),
        ("metric: tokn", "selection.metric: input should be 'token' or 'gate' (got 'tokn')"),
        (
            "preset: official",
            'selection.preset: preset: unknown preset "official"; did you mean "official-gate"?',
        ),
    ],
)
def test_a_selection_rule_is_checked_when_the_recipe_is_read(
    folder: Path, rule: str, message: str
) -> None:
    path = write(folder, f"model: m\ndata: {{train: t}}\nselection:\n  {{{rule}}}\n")
    # No model, no data: nothing could have been profiled.
    assert refused(path) == f"recipe.yaml:4: {message}"


def test_a_rule_given_by_an_option_is_called_by_it() -> None:
    for p in (0.0, 1.5):
        with pytest.raises(RecipeError, match=r"^--p: p must be above 0 and at most 1 \(it is"):
            recipe_from_options("m", "t.jsonl", [Override("--p", ("selection", "p"), p)])
    with pytest.raises(RecipeError, match=r"^--set selection\.p: p must be above 0"):
        recipe_from_options("m", "t.jsonl", ["selection.p=0"])


def test_methods_and_selections_that_contradict_each_other(folder: Path) -> None:
    start = "model: m\ndata: {train: t}\n"
    path = write(folder, start + "method: random\nselection: file.json\n")
    assert refused(path).startswith("recipe.yaml:4: selection: method random draws its own")
    path = write(folder, start + "selection: file.json\n")
    option = Override("--p", ("selection", "p"), 0.2)
    assert refused(path, option).startswith("--p: contradicts selection, which is '")
    path = write(folder, start + "method: full\nparam_dtype: bfloat16\n")
    assert refused(path).startswith("recipe.yaml:4: param_dtype: ")
    path = write(folder, start + "training: {eval_strategy: steps}\n")
    assert refused(path) == (
        "recipe.yaml:3: training.eval_strategy: is set, but data.eval names no test set"
    )
    path = write(folder, start + "training: {eval_on_start: true}\n")
    assert "training.eval_on_start: is set, but data.eval" in refused(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_dir", "x"),
        ("resume_from_checkpoint", "x"),
        ("deepspeed", "config.json"),
        ("use_liger_kernel", "true"),
        ("per_device_eval_batch_size", "4"),
        ("push_to_hub", "true"),
    ],
)
def test_fields_that_are_not_honoured_are_refused_with_a_reason(
    folder: Path, field: str, value: str
) -> None:
    message = refused(write(folder, FULL.replace("max_steps: 20", f"{field}: {value}")))
    start, reason = message.split(": cannot be set: ")
    assert start == f"recipe.yaml:9: training.{field}"
    assert len(reason) > 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a\ndata: b\n", "recipe.yaml:2: not YAML: "),
        ("a: b: c\n", "recipe.yaml:1: not YAML: mapping values are not allowed here"),
        ("", "recipe.yaml:1: a recipe is a mapping of keys"),
        ("- model\n", "recipe.yaml:1: a recipe is a mapping of keys"),
        ("model: a\0b\n", "recipe.yaml: not YAML: unacceptable character"),
        ("model: a\ndata: {}\nmodel: b\n", "recipe.yaml:3: not YAML: the key model is given twice"),
        ("training:\n  seed: 1\n  seed: 2\n", "recipe.yaml:3: not YAML: the key seed is given tw"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:2: not YAML: aliases (*name) are not for recipes"),
        ("model: !!int x\n", "recipe.yaml: not YAML: "),
        ("a: " + "[" * 5000, "recipe.yaml: not usable YAML: nested too deep"),
    ],
)
def test_what_is_not_yaml(folder: Path, text: str, message: str) -> None:
    assert refused(write(folder, text)).startswith(message)


def test_files_that_cannot_be_read(folder: Path) -> None:
    assert refused(folder / "none.yaml") == (
        "none.yaml: no such recipe; to train a model without a recipe, give --data"
    )
    assert "recipes: a folder, not a recipe; to train a model" in refused(folder)
    (folder / "latin.yaml").write_bytes("model: ü".encode("latin-1"))
    assert refused(folder / "latin.yaml") == "latin.yaml: this recipe is not UTF-8 text (byte 7)"


@pytest.mark.parametrize(
    "tag",
    ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"],
)
def test_yaml_that_would_run_code_is_refused(folder: Path, tag: str) -> None:
    canary = folder / "canary"
    path = write(folder, f"model: m\ndata: !!{tag} ['touch {canary}']\n")
    assert refused(path).startswith("recipe.yaml:2: not YAML: could not determine a constructor")
    with pytest.raises(RecipeError, match="the value is not YAML"):
        make_recipe(MINIMAL, [f"model=!!{tag} ['touch {canary}']"])
    assert not canary.exists()


def test_aliases_that_would_fill_the_memory(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    assert "aliases" in refused(write(folder, "\n".join(lines)))
    assert "aliases" in refused(write(folder, "model: &m [*m]\n"))


def test_overrides(folder: Path) -> None:
    path = write(folder, FULL)
    recipe = read_recipe(
        path,
        [
            "training.max_steps=3",
            "training.weight_decay=0.1",
            "data.packing=false",
            "lora={r: 2}",
            "method=lora",
            "selection=null",
            "training.run_name=a=b",
        ],
    )
    assert recipe.training["max_steps"] == 3
    assert recipe.training["weight_decay"] == 0.1
    assert recipe.training["learning_rate"] == 0.001
    assert recipe.training["run_name"] == "a=b"
    assert (recipe.data.packing, recipe.method, recipe.selection) == (False, "lora", None)
    assert recipe.lora is not None
    assert recipe.lora.r == 2
    # Sections that are not there are made.
    made = make_recipe(MINIMAL, ["selection.p=0.4", "lora=", "training.seed=1"])
    assert isinstance(made.selection, SelectionSpec)
    assert (made.selection.p, made.training["seed"]) == (0.4, 1)
    # The last one wins.
    assert make_recipe(MINIMAL, ["device=a", "device=b"]).device == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", "--set training.max_steps: write key=value, such as training.max"),
        ("=3", "--set =3: write key=value"),
        ("training..seed=3", "--set training..seed=3: write key=value"),
        ("training.seed=[", "--set training.seed=[: the value is not YAML"),
        ("training.seeed=3", '--set training.seeed: unknown key; did you mean "seed"?'),
        ("data.trian=3", '--set data.trian: unknown key; did you mean "train"?'),
        ("data={trian: 3}", '--set data.trian: unknown key; did you mean "train"?'),
        ("training.max_steps=soon", "--set training.max_steps: input should be a valid integer"),
        ("training.torch_compile=true", "--set training.torch_compile: cannot be set: "),
        ("selection.p=2", "--set selection.p: p must be above 0 and at most 1 (it is 2.0)"),
        ("model.name=x", "--set model.name: contradicts model, which is 'tiny-moe'"),
    ],
)
def test_errors_in_overrides_name_the_override(folder: Path, override: str, message: str) -> None:
    assert refused(write(folder, FULL), override).startswith(message)


def test_paths_are_relative_to_where_they_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder.parent / "here"
    (here / "mine").mkdir(parents=True)
    (folder / "model").mkdir()
    monkeypatch.chdir(here)
    text = "model: model\nselection: s.json\ndata: {train: ../t.jsonl, eval: /abs/e.jsonl}\n"
    recipe = read_recipe(write(folder, text))
    assert recipe.model == str(folder / "model")
    assert recipe.selection == str(folder / "s.json")
    assert recipe.data.train == str(folder.parent / "t.jsonl")
    assert recipe.data.eval == "/abs/e.jsonl"
    # In options: to the working directory; the recipe of the run must say so.
    options = ["data.train=t.jsonl", "selection=s.json", "model=mine"]
    changed = read_recipe(write(folder, text), options)
    assert changed.data.train == str(here / "t.jsonl")
    assert changed.selection == str(here / "s.json")
    assert changed.model == str(here / "mine")
    assert read_recipe(write(here / "mine", changed.to_yaml())) == changed
    # A hub id looks like a relative path.
    assert read_recipe(write(folder, text), ["model=org/name"]).model == "org/name"
    assert make_recipe({"model": Path("mine"), "data": {"train": Path("t")}}).data.train == str(
        here / "t"
    )


def test_what_ships_with_tiny_moe_is_found_wherever_the_recipe_lies(folder: Path) -> None:
    text = "model: tiny-moe\ndata: {train: [{path: tiny-moe:tasks/dates/train.jsonl}]}\n"
    recipe = read_recipe(write(folder, text), ["data.eval=tiny-moe:tasks/dates/test.jsonl"])
    assert [
        source.path for source in (*recipe.data.sources("train"), *recipe.data.sources("eval"))
    ] == [str(TINY_MOE_FOLDER / "tasks" / "dates" / name) for name in ("train.jsonl", "test.jsonl")]


def test_a_recipe_from_options_is_for_a_model() -> None:
    with pytest.raises(RecipeError, match=r"--data: is for a model; r\.yaml is a recipe"):
        recipe_from_options("r.yaml", "t.jsonl")


def test_every_training_field_of_the_repository_s_recipes_is_known() -> None:
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        if path.stem == "compare":  # has more than one method
            assert Planner(as_compare_recipe(path)).methods
        else:
            read_recipe(path)


def test_validation_rows_are_named_or_set_aside_not_both() -> None:
    data = {"train": "a.jsonl", "eval": "b.jsonl", "eval_rows": 4}
    with pytest.raises(RecipeError, match=r"data\.eval_rows: data\.eval names validation rows"):
        make_recipe({"model": "m", "data": data})


def test_a_recipe_for_several_methods_says_so() -> None:
    path = Path(__file__).parents[1] / "recipes" / "compare.yaml"
    with pytest.raises(RecipeError, match=r"compare\.yaml:\d+: compare: .*esft compare takes it"):
        read_recipe(path)


def test_a_recipe_error_is_the_user_s() -> None:
    assert issubclass(RecipeError, EsftError)
    assert RecipeError.exit_code == 1


SOURCES = """\
model: m
data:
  eval: {path: more/test, split: test}
  train:
    - a.jsonl
    - {path: ../b, weight: 2}
    - {path: owner/name, config: main, split: train, format: text}
"""


def test_sources_of_data(folder: Path) -> None:
    recipe = read_recipe(write(folder, SOURCES))
    assert recipe.data.sources("train") == [
        SourceSpec(path=str(folder / "a.jsonl"), format="auto"),
        SourceSpec(path=str(folder.parent / "b"), format="auto", weight=2),
        SourceSpec(path="owner/name", config="main", split="train", format="text"),
    ]
    # What looks like a hub id is one, unless it is there.
    assert [source.path for source in recipe.data.sources("eval")] == ["more/test"]
    (folder / "more" / "test").mkdir(parents=True)
    recipe = read_recipe(folder / "recipe.yaml", ["data.format=sharegpt"])
    assert [source.path for source in recipe.data.sources("eval")] == [str(folder / "more/test")]
    formats = [source.format for source in recipe.data.sources("train")]
    assert formats == ["sharegpt", "sharegpt", "text"]
    assert make_recipe(MINIMAL).data.sources("eval") == []
    assert read_recipe(write(folder / "more", recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 2", "weight: 0", "6: data.train.1.weight: input should be greater than 0 (got 0"),
        ("weight: 2", "wieght: 2", '6: data.train.1.wieght: unknown key; did you mean "weight"?'),
        ("weight: 2", "weight: .inf", "6: data.train.1.weight: must be finite (got inf)"),
        ("path: ../b", "pth: ../b", '6: data.train.1.pth: unknown key; did you mean "path"?'),
        ("format: text", "format: txt", "7: data.train.2.format: input should be 'messages', "),
        ("split: test", "splt: test", '3: data.eval.splt: unknown key; did you mean "split"?'),
        ("{path: more/test, split: test}", "7", "3: data.eval: "),
    ],
)
def test_mistakes_in_sources(folder: Path, old: str, new: str, message: str) -> None:
    said = refused(write(folder, SOURCES.replace(old, new, 1)))
    assert said.startswith(f"recipe.yaml:{message}")


@pytest.mark.parametrize(
    "override", ["data.skip_bad=-1", "data.train=[]", "data.format=txt", "data.seed=1.5"]
)
def test_wrong_values_of_data(folder: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert refused(write(folder, FULL), override).startswith(f"--set {key}: ")

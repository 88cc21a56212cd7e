"""X2 and X4: programs that come with files. A checkpoint's code, recipes' YAML, chat templates."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

from esft.data import template_bounds
from tests.checkpoints import save_tiny
from tests.command import Argument, esft
from tests.remote import with_own_code

PAIRS = "".join(json.dumps({"prompt": f"{n}:", "completion": "ab"}) + "\n" for n in range(8))
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CHAT = json.dumps({"messages": TURNS}) + "\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "deepseek", "deepseek_v2")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder that whatever gets to run would make."""
    return tmp_path / "canary"


def refused(*arguments: Argument) -> str:
    result = esft(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert len(error) < 1000
    return error


# X2


@pytest.mark.parametrize("command", ["train", "profile", "eval", "generate"])
def test_x2_code_of_a_checkpoint(
    command: str, base: Path, canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "modules")  # transformers copies the code that it runs
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a prompt would be answered
    model = with_own_code(base, tmp_path / "own")
    code = model / "modeling_listed.py"
    code.write_text(
        code.read_text() + f"\n\nimport os\nos.makedirs({str(canary)!r}, exist_ok=True)\n"
    )
    (tmp_path / "rows.jsonl").write_text(PAIRS)
    data: list[Argument] = ["--data", tmp_path / "rows.jsonl"]
    options: dict[str, list[Argument]] = {
        "train": [*data, "--steps", 1, "--set", "data.max_length=32", "--out", tmp_path / "run"],
        "profile": [*data, "--out", tmp_path / "scores.json"],
        "eval": data,
        "generate": ["--prompt", "1:", "--max-new-tokens", 1],
    }
    error = refused(command, model, *options[command])
    assert "code of its own (auto_map)" in error
    assert "--trust-remote-code" in error
    assert not canary.exists()
    assert not (tmp_path / "run").exists()
    result = esft(command, model, *options[command], "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert canary.exists()


# X4: recipes


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_x4_yaml_that_asks_for_objects(canary: Path, base: Path, tmp_path: Path) -> None:
    out: list[Argument] = ["--out", tmp_path / "run"]
    for tag in ("python/object/apply:os.makedirs", "python/object/new:os.makedirs"):
        path = recipe(tmp_path, f"model: {base}\ndata:\n  train: !!{tag} ['{canary}']\n")
        assert "recipe.yaml:3: not YAML: could not determine a constructor" in refused(
            "train", path, *out
        )
        path = recipe(tmp_path, f"model: {base}\ndata: {{train: x.jsonl}}\n")
        assert "the value is not YAML" in refused(
            "train", path, *out, "--set", f"data.train=!!{tag} ['{canary}']"
        )
    for tag in ("python/name:os.makedirs", "python/module:os", "python/tuple", "binary"):
        refused("train", recipe(tmp_path, f"model: !!{tag} x\ndata: {{train: x}}\n"), *out)
    assert not canary.exists()


def test_x4_yaml_that_stands_for_more_than_memory_holds(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 15)]
    started = time.monotonic()
    bomb = recipe(tmp_path, "\n".join(lines))
    assert "recipe.yaml:2: not YAML: aliases (*name)" in refused("train", bomb, "--out", "run")
    itself = recipe(tmp_path, "model: m\ndata: &a {train: *a}\n")
    assert "aliases" in refused("train", itself, "--out", "run")
    merged = recipe(tmp_path, "model: m\ndata: &a {train: x}\nlora: {<<: *a}\n")
    assert "aliases" in refused("train", merged, "--out", "run")
    deep = recipe(tmp_path, "a: " + "[" * 50_000)
    assert "nested too deep" in refused("train", deep, "--out", "run")
    assert time.monotonic() - started < 20


NUMBERS = {
    "decimal": "9" * 5000,
    "hexadecimal": "0x" + "f" * 5000,
    "binary": "0b" + "1" * 5000,
    "sexagesimal": "1" + ":59" * 3000,
    "printable": "9" * 4000,
    "infinite": "1e99999",
}


def test_x4_numbers_that_nothing_holds(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(PAIRS)
    started = time.monotonic()
    for value in NUMBERS.values():
        for line in (
            "max_length: 16\n  {}: 1",
            "max_length: {}",
            "max_length: 16\nselection: {{p: {}}}",
        ):
            text = f"model: {base}\ndata:\n  train: rows.jsonl\n  {line.format(value)}\n"
            error = refused("train", recipe(tmp_path, text), "--out", tmp_path / "run")
            assert "recipe.yaml:" in error
    command: list[Argument] = [
        "train",
        recipe(tmp_path, f"model: {base}\ndata: {{train: rows.jsonl}}\n"),
    ]
    command += ["--out", tmp_path / "run", "--set"]
    # Within 64 bits, and still nothing that a run could take.
    for option in (
        "data.max_length=9223372036854775807",
        "training.seed=-1",
        "training.seed=4294967296",
    ):
        assert option.partition("=")[0] in refused(*command, option)
    assert time.monotonic() - started < 20
    assert not (tmp_path / "run").exists()


# X4: chat templates

ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.makedirs('CANARY') }}",
    "{{ lipsum.__globals__['os'].makedirs('CANARY') }}",
    "{{ namespace.__init__.__globals__['__builtins__'].open('CANARY', 'w') }}",
    "{{ (messages | map('attr', '__class__') | list)[0].__base__ }}",
    "{% set m = messages.append(0) %}{{ messages }}",
    "{{ ''['__cla' ~ 'ss__'] }}{{ ('' | attr('__cla' ~ 'ss__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.makedirs('CANARY') }}",
)
NESTED = "{% for a in range(99999) %}" * 3 + "BODY" + "{% endfor %}" * 3
ENDLESS = {
    "loops": NESTED.replace("BODY", ""),
    "one long computation": "{% set x = 10 ** (10 ** 9) %}{{ x > messages | length }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}
HUGE = {
    "one text": "{{ 'a' * 10 ** 11 }}",
    "many texts": NESTED.replace("BODY", "{{ 'a' * 100000 }}"),
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
    "{% endfor %}{{ n.s }}",
    "padding": "{{ 'a' | center(10 ** 11) }}{{ '%099999999999d' | format(1) }}",
    "more than any model reads": "{{ 'a' * 30000000 }}",
}


def with_template(base: Path, folder: Path, template: str) -> Path:
    """Copy the checkpoint, with another chat template."""
    model = Path(shutil.copytree(base, folder))
    (model / "chat_template.jinja").write_text(template)
    return model


def rows(folder: Path) -> Path:
    path = folder / "chat.jsonl"
    path.write_text(CHAT * 3)
    return path


@pytest.mark.parametrize("command", ["train", "generate"])
def test_x4_templates_that_reach_for_the_system(
    command: str, base: Path, canary: Path, tmp_path: Path
) -> None:
    options: list[Argument] = ["--prompt", "hi", "--chat"]
    if command == "train":
        options = ["--data", rows(tmp_path), "--out", tmp_path / "run"]
    for number, template in enumerate(ESCAPES):
        text = template.replace("CANARY", str(canary))
        error = refused(command, with_template(base, tmp_path / f"{number}", text), *options)
        assert ("chat.jsonl:1: " in error) == (command == "train"), template
        assert not canary.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("templates", [ENDLESS, HUGE], ids=["endless", "huge"])
def test_x4_templates_that_never_end_or_fill_the_memory(
    templates: dict[str, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert template_bounds.SECONDS <= 10
    monkeypatch.setattr(template_bounds, "SECONDS", 1)
    data = rows(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, template in templates.items():
        model = with_template(base, tmp_path / name, template)
        error = refused("train", model, "--data", data, "--out", tmp_path / "run")
        assert "chat.jsonl:1: the chat template" in error, name
    assert not (tmp_path / "run").exists()
    # Not in this process; "more than any model reads" gets this far.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300_000


def test_more_a_recipe_is_no_template_of_the_card(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "{{ 6 * 7 }}{% for x in y %}.jsonl"
    data.write_text(PAIRS)
    options: list[Argument] = ["--data", data, "--steps", 1, "--set", "data.max_length=16"]
    result = esft("train", base, *options, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "run" / "README.md").read_text()
    assert "{{ 6 * 7 }}{% for x in y %}.jsonl" in card

"""The package as others install it: what is in the wheel, and that it works from anywhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves `build/` beside the sources, and stale files in it.
    source = out / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, capture_output=True)
    return next(out.glob("esft-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(code: str, path: str | Path, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_python_file_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in (ROOT / "esft", ROOT / "cli" / "esft_cli", ROOT / "kernels" / "esft_kernels"):
        for file in folder.rglob("*.py"):
            assert file.relative_to(folder.parent).as_posix() in names


def test_the_wheel_has_the_tiny_model_and_type_marks_and_no_package_named_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ("py.typed", "tiny_moe/model.safetensors", "tiny_moe/tokenizer.json"):
        assert f"esft/{needed}" in names
    shipped = [("recipes", ROOT / "recipes", "*.yaml")]
    shipped.append(("report/templates", ROOT / "esft" / "report" / "templates", "*"))
    for place, folder, pattern in shipped:
        files = list(folder.glob(pattern))
        assert files
        assert {f"esft/{place}/{file.name}" for file in files} <= names
    assert any(n.startswith("esft/tiny_moe/tasks/") and n.endswith("train.jsonl") for n in names)
    assert any(n.startswith("esft/tiny_moe/heldout/") for n in names)
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {
        "esft",
        "esft_cli",
        "esft_kernels",
    }


def test_an_installed_esft_works_elsewhere(installed, tmp_path):
    code = (
        "import esft, esft.loading; found = esft.inspect('tiny-moe');"
        "print(esft.__file__, found.model_type)"
    )
    out = run(code, installed, tmp_path)
    assert str(installed) in out
    assert "deepseek_v2" in out


def test_transformers_finds_no_kernels_of_ours_beside_the_hugging_face_package(tmp_path):
    """With a distribution named `kernels` installed, and without, from the repository root."""
    stub = tmp_path / "kernels"
    stub.mkdir()
    (stub / "__init__.py").write_text("__version__ = '0.0.0'\nHERE = __file__\n")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "cli"), str(ROOT / "kernels")])
    code = "import esft.experts, kernels; print(kernels.HERE)"
    assert str(stub) in run(code, paths, ROOT)
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "cli" / "__init__.py").exists()


def test_the_public_names_are_the_documented_functions():
    import esft

    for name in esft.__all__:
        value = getattr(esft, name)
        assert value.__doc__ or name == "__version__"
    # A verb stays a function after its module was imported: no module bears a verb's name.
    modules = {path.stem for path in (ROOT / "esft").glob("*.py")}
    assert not modules & set(esft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        esft.nothing  # noqa: B018


def test_constraints_satisfy_the_ranges():
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().split("\n")
        if "==" in line and not line.startswith("#")
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extras.pop("harness")  # too large for .venv, whose packages the constraints are
    for text in [*project["dependencies"], *itertools.chain(*extras.values())]:
        requirement = Requirement(text)
        if requirement.name in ("torch", "esft"):  # torch: by the Makefile, before the rest
            continue
        version = pinned[requirement.name.lower().replace("_", "-")]
        assert version in requirement.specifier, text

"""X3: what our sources import and call, so that nothing that unpickles comes in unnoticed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.command import ROOT

PARTS = ("esft", "cli", "kernels", "examples", "tools")
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Functions that unpickle, run text as a program, or build any object that a YAML file asks for.
FORBIDDEN = {
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("numpy.fromfile", "pandas.read_pickle", "torch.serialization.load"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "yaml.CLoader"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("jinja2.Environment.from_file", "subprocess.getoutput"),
}
# Arguments of other libraries' functions that let them unpickle, or run code that came with a file.
UNSAFE = {
    "weights_only": False,
    "allow_pickle": True,
    "trust_remote_code": True,
    "use_safetensors": False,
    "safe_serialization": False,
    "shell": True,
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for part in PARTS:
        for path in sorted((ROOT / part).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    """Yield each call with the full name of what it calls, through `import a as b` and the like."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                known[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield node, known.get(first, first) + dot + rest


def findings(trees: Iterator[tuple[Path, ast.Module]]) -> list[str]:
    """Describe every import and call in the sources that X3 forbids."""
    found = []
    for path, tree in trees:
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            bad = [n for n in names if n.split(".")[0] in UNPICKLERS or n in FORBIDDEN]
            found += [f"{path}:{node.lineno}: imports {name}" for name in bad]  # type: ignore[attr-defined]
        for call, name in calls(tree):
            if name in FORBIDDEN:
                found.append(f"{path}:{call.lineno}: calls {name}")
    return found


def unsafe_arguments(trees: Iterator[tuple[Path, ast.Module]]) -> list[str]:
    """Describe every call that asks a library to unpickle, or a load that does not rule it out."""
    found = []
    for path, tree in trees:
        for call, name in calls(tree):
            given = {k.arg: k.value for k in call.keywords}
            for option, value in given.items():
                literal = value.value if isinstance(value, ast.Constant) else None
                if option in UNSAFE and literal is UNSAFE[option]:
                    found.append(f"{path}:{call.lineno}: {option}={literal}")
            loads_weights = name.endswith(".from_pretrained") and "auto_class" in name
            if loads_weights and ast.unparse(given.get("use_safetensors", call)) != "True":
                found.append(f"{path}:{call.lineno}: {name} without use_safetensors=True")
            if name in ("numpy.load", "np.load") and "allow_pickle" not in given:
                found.append(f"{path}:{call.lineno}: {name} without allow_pickle=False")
    return found


SAFE = "import yaml\nmodel.eval()\nre.compile('x')\nyaml.safe_load('1')\ntorch.compile(f)\n"
BAD = (
    "import pickle",
    "from joblib import load",
    "import torch.serialization as s\ns.load('x')",
    "import torch\ntorch.load('x')",
    "from torch import load as read\nread('x')",
    "import yaml as y\ny.load('x')",
    "from yaml import UnsafeLoader",
    "eval('1')",
    "exec('1')",
)
BAD_ARGUMENTS = (
    "f(weights_only=False)",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nnp.load('x')",
    "AutoModel.from_pretrained('x', trust_remote_code=True)",
    "auto_class(c).from_pretrained('x')",
)


def parsed(*texts: str) -> Iterator[tuple[Path, ast.Module]]:
    return iter([(Path("x.py"), ast.parse(text)) for text in texts])


def test_x3_nothing_here_unpickles_or_runs_text() -> None:
    assert findings(parsed(SAFE)) == []
    for text in BAD:  # the scan finds them
        assert findings(parsed(text)), text
    assert findings(sources()) == []


def test_x3_no_library_is_asked_to_unpickle_or_run_code() -> None:
    assert unsafe_arguments(parsed(SAFE)) == []
    for text in BAD_ARGUMENTS:
        assert unsafe_arguments(parsed(text)), text
    assert unsafe_arguments(sources()) == []

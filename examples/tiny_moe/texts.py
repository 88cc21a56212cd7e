"""Running text: Python source and English technical prose, from what Python and pip installed.

Both generators take a `random.Random` and yield `(key, document)`; the key is the file the
document came from, so that a held-out file is never seen in training, not even in part.
"""

import ast
import importlib.metadata
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Every one under a permissive licence (BSD, MIT, PSF or Apache 2.0): the manifest names each.
PROSE_PACKAGES = (
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "pydantic",
    "rich",
    "sympy",
    "transformers",
)
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "_vendor"}


def source_files(root: Path) -> list[Path]:
    """Python files under `root`, tests and generated tables left out, ordered by relative path."""
    files = (p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def package_root(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises ModuleNotFoundError, with what to install, where the package is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install -e .[pretrain]")
    return Path(spec.submodule_search_locations[0])


def code(rng: random.Random) -> Iterator[tuple[str, str]]:
    """The Python standard library, a file a document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in source_files(root) if "pydoc_data" not in p.parts]
    rng.shuffle(files)
    for path in files:
        name = path.relative_to(root).as_posix()
        yield f"python/{name}", path.read_text(encoding="utf-8", errors="replace")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text` that read as English: long, mostly letters, ending as a sentence."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if len(paragraph) >= 80 and letters >= 0.85 * len(paragraph) and paragraph.endswith("."):
            kept.append(paragraph)
    return kept


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file's module, classes and functions, in the order of the file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except SyntaxError:  # packages ship files for other Pythons too
        return
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def prose(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Python's language reference and the packages' docstrings, a topic or a file a document.

    A paragraph that was met before is dropped: packages repeat whole docstrings.
    """
    from pydoc_data.topics import topics

    sources: list[tuple[str, str | Path]] = [(f"topic/{k}", v) for k, v in sorted(topics.items())]
    for package in PROSE_PACKAGES:
        root = package_root(package)
        sources += [(f"{package}/{p.relative_to(root).as_posix()}", p) for p in source_files(root)]
    rng.shuffle(sources)
    seen: set[str] = set()
    for name, origin in sources:
        kept = []
        for text in [origin] if isinstance(origin, str) else docstrings(origin):
            for paragraph in paragraphs(text):
                if paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
        if kept:
            yield name, "\n\n".join(kept)


def licence(package: str) -> str:
    """The licence that a package's metadata state: expression, classifier or first line."""
    meta = importlib.metadata.metadata(package)
    classifiers = [c for c in meta.get_all("Classifier") or () if c.startswith("License ::")]
    if meta["License-Expression"]:
        return meta["License-Expression"]
    if classifiers:
        return classifiers[0].split(" :: ")[-1]
    return (meta["License"] or "not stated").splitlines()[0]

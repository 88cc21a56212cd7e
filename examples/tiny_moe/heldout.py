"""Cut a small held-out set per pretraining domain, to measure what specialising makes forget.

    python examples/tiny_moe/heldout.py --corpus build/tiny_moe/corpus

Reads `<domain>.heldout.jsonl` as corpus.py wrote it (text that pretraining never saw) and writes
`esft/tiny_moe/heldout/<domain>.jsonl` with `prompt` and `completion`, so that `esft eval` can
score it. A line of the form `question = answer` is cut there; other text after its first words.
"""

import argparse
import json
from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "esft" / "tiny_moe" / "heldout"
CHARACTERS = 6_000  # of text a domain, about 2,000 tokens
ROW = 800  # characters of running text in a row at most
PROMPT = 60  # characters of running text that are given


def rows(documents: list[str]) -> list[dict[str, str]]:
    """Turn held-out documents, in their order, into rows of `CHARACTERS` characters together."""
    found: list[dict[str, str]] = []
    left = CHARACTERS
    for document in documents:
        if left <= 0:
            break
        row = _cut(document)
        if row is not None:
            found.append(row)
            left -= len(row["prompt"]) + len(row["completion"])
    return found


def _cut(document: str) -> dict[str, str] | None:
    text = document.strip()
    question, equals, answer = text.partition(" = ")
    if equals and "\n" not in text:
        return {"prompt": f"{question} =", "completion": f" {answer}"}
    text = text[:ROW]
    space = text.find(" ", PROMPT)
    if space < 0 or not text[space:].strip():
        return None  # too short to have a beginning and an end
    return {"prompt": text[:space], "completion": text[space:]}


def main() -> None:
    """Write a file for each domain of a corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder that corpus.py wrote")
    args = parser.parse_args()
    files = sorted(args.corpus.glob("*.heldout.jsonl"))
    if not files:
        parser.error(f"{args.corpus}: no <domain>.heldout.jsonl here; run corpus.py first")
    SHIPPED.mkdir(parents=True, exist_ok=True)
    for file in files:
        documents = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(documents)]
        domain = file.name.removesuffix(".heldout.jsonl")
        (SHIPPED / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{domain}: {len(lines)} rows")


if __name__ == "__main__":
    main()

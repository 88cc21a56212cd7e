"""Import of the raw routing logs that the official ESFT code writes.

One file a layer, `expert_weights_<layer>.txt`, perhaps with a prefix and gzipped. A line holds
one sequence: the expert ids of all its tokens, K a token, separated by tabs; two tabs; as many gate
values, separated by tabs.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esft.errors import SelectionError
from esft.scores import LayerScores, Scores

# The logs do not say how many experts a token used. The official model, DeepSeek-V2-Lite, uses 6.
OFFICIAL_TOP_K = 6

_NAME = re.compile(r"(?:.*_)?expert_weights_(\d+)\.txt(?:\.gz)?")


@dataclass(frozen=True)
class _Log:
    """Sums over one file: tokens that chose each expert, and gate values, both `[E]` so far."""

    sequences: int
    tokens: int
    counts: np.ndarray
    gates: np.ndarray


def import_logs(
    path: str | Path, *, top_k: int = OFFICIAL_TOP_K, experts: int | None = None
) -> Scores:
    """Turn raw routing logs into scores.

    `token[i] = count_i / K / tokens` and `gate[i] = sum_i / tokens`, summed in float64.

    Args:
        path: a folder of logs, or one log.
        top_k: K; checked as far as the logs allow: no token has an expert twice.
        experts: E of each layer; None takes the highest id in all layers and adds one, which
            misses experts at the end that no token of any layer used.

    Raises:
        SelectionError: there are no logs, a line cannot be read (`file:line: reason`), or the
            layers' logs have different numbers of tokens.
    """
    for option, number in (("--top-k", top_k), ("--experts", experts)):
        if number is not None and number < 1:
            raise SelectionError(f"{option} {number}: must be at least 1")
    logs = {layer: _read(file, top_k) for layer, file in _find(Path(path)).items()}
    highest = max(len(log.counts) for log in logs.values())
    if experts is not None and highest > experts:
        raise SelectionError(f"--experts {experts}: {path} has an expert {highest - 1}")
    size = experts or highest
    if top_k > size:
        raise SelectionError(f"--top-k {top_k}: {path} has only {size} experts")
    first = min(logs)
    for layer, log in logs.items():
        if log.tokens != logs[first].tokens:
            raise SelectionError(
                f"{path}: layer {layer} has {log.tokens} tokens and layer {first} has "
                f"{logs[first].tokens}; a log is incomplete, or --top-k {top_k} is wrong"
            )
    return Scores(
        layers={layer: _scores(log, size, top_k) for layer, log in sorted(logs.items())},
        sample={
            "data": str(path),
            "count": None,
            "tokens": logs[first].tokens,
            "sequences": logs[first].sequences,
            "seq_len": None,
            "seed": None,
        },
    )


def _find(path: Path) -> dict[int, Path]:
    if not path.exists():
        raise SelectionError(f"{path}: no such file or folder")
    found: dict[int, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        match = _NAME.fullmatch(file.name)
        if not match:
            continue
        layer = int(match[1])
        if layer in found:
            raise SelectionError(f"{path}: layer {layer} twice: {found[layer].name}, {file.name}")
        found[layer] = file
    if not found:
        raise SelectionError(
            f"{path}: no logs here; they are named expert_weights_<layer>.txt[.gz]"
        )
    return found


def _read(file: Path, top_k: int) -> _Log:
    counts, gates = np.zeros(0), np.zeros(0)
    sequences = tokens = 0
    for number, line in _lines(file):
        where = f"{file}:{number}"
        ids, weights = _parse(line, top_k, where)
        size = max(len(counts), int(ids.max()) + 1)
        counts = _grown(counts, size) + np.bincount(ids, minlength=size)
        gates = _grown(gates, size) + np.bincount(ids, weights, minlength=size)
        sequences += 1
        tokens += len(ids) // top_k
    if not tokens:
        raise SelectionError(f"{file}: no tokens in it")
    return _Log(sequences, tokens, counts, gates)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    opened = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SelectionError(f"{file}:{number + 1}: cannot read this log: {error}") from error


def _parse(line: str, top_k: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the expert ids and gate values of a line, both `[tokens * K]`."""
    halves = line.split("\t\t")
    if len(halves) != 2:
        raise SelectionError(f"{where}: expected expert ids, two tabs, gate values")
    try:
        ids = np.array(halves[0].split("\t"), dtype=np.int64)
        weights = np.array(halves[1].split("\t"), dtype=np.float64)
    except (ValueError, OverflowError) as error:
        raise SelectionError(f"{where}: {error}") from None
    if len(ids) != len(weights):
        raise SelectionError(f"{where}: {len(ids)} expert ids but {len(weights)} gate values")
    if len(ids) % top_k:
        raise SelectionError(
            f"{where}: {len(ids)} expert ids cannot be {top_k} a token; give --top-k"
        )
    if ids.min() < 0 or ids.max() >= 1 << 20:
        raise SelectionError(f"{where}: an expert id is negative or far too high")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise SelectionError(f"{where}: a gate value is negative or not finite")
    tokens = np.sort(ids.reshape(-1, top_k), axis=1)
    if (tokens[:, 1:] == tokens[:, :-1]).any():
        raise SelectionError(
            f"{where}: a token has the same expert twice, reading {top_k} a token; give --top-k"
        )
    return ids, weights


def _grown(sums: np.ndarray, size: int) -> np.ndarray:
    return np.pad(sums, (0, size - len(sums)))


def _scores(log: _Log, experts: int, top_k: int) -> LayerScores:
    return LayerScores(
        experts=experts,
        top_k=top_k,
        tokens=log.tokens,
        token=(_grown(log.counts, experts) / top_k / log.tokens).tolist(),
        gate=(_grown(log.gates, experts) / log.tokens).tolist(),
    )

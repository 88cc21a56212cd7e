"""What identifies a base checkpoint: dtype, shape and sha256 of each of its tensors.

Independent of how the checkpoint is cut into files. safetensors notices neither NaN nor a flipped
payload byte, hence the hashes. A tokenizer counts by what its ids stand for.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from esft.errors import CheckError
from esft.files import read_json
from esft.shards import Checkpoint, Entry, read_blocks

# Tensor name -> {"dtype": "BF16", "shape": [2, 3], "sha256": "..."}.
Fingerprint = dict[str, dict[str, Any]]

_THREADS = 4  # hashing releases the interpreter lock; more only fight over the disk


def fingerprint(checkpoint: Checkpoint) -> Fingerprint:
    """Read and hash every tensor of a checkpoint; sorted by name."""
    names = sorted(checkpoint.entries)
    entries = [checkpoint.entries[name] for name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(hash_tensor, entries))
    return {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": digest}
        for name, entry, digest in zip(names, entries, hashes, strict=True)
    }


def hash_tensor(entry: Entry) -> str:
    """Return the hex sha256 of a tensor's bytes on disk.

    Raises:
        ModelError: the file ends within the tensor.
    """
    digest = sha256()
    for block in read_blocks(entry):
        digest.update(block)
    return digest.hexdigest()


def fingerprint_digest(base: Fingerprint) -> str:
    """Return one hex sha256 for a fingerprint: of its JSON, keys sorted, no spaces, ASCII."""
    return _digest(base)


def tokenizer_digest(folder: Path) -> str | None:
    """Return the hex sha256 of which id stands for which text, or None without `tokenizer.json`.

    Chat template, padding and the like may change; the spelling of the file may, too.

    Raises:
        EsftError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_json(path, "tokenizer")
    try:
        model = content["model"]
        # Older files hold a merge as one text, newer ones as a pair.
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
        added = [[token["id"], token["content"]] for token in content.get("added_tokens") or []]
        return _digest([model.get("type"), model.get("vocab"), merges, added])
    except (KeyError, TypeError, AttributeError):
        return _digest(content)


def check_base(
    expected: Fingerprint,
    base: Checkpoint,
    *,
    hashes: bool = True,
    tokenizer: str | None = None,
) -> None:
    """Check that a checkpoint is the base that a delta was made from.

    Args:
        expected: the base's fingerprint, as the delta holds it.
        base: the checkpoint.
        hashes: whether to read and hash every tensor, instead of only comparing names, dtypes
            and shapes. `merge` hashes while it copies.
        tokenizer: the digest of the base's tokenizer, where it is known; a folder without a
            tokenizer passes.

    Raises:
        CheckError: it is another one; names the first tensor that differs.
    """
    for name, tensor in expected.items():
        entry = base.entries.get(name)
        if entry is None:
            raise CheckError(_differs(base.folder, f"tensor {name} is missing from it"))
        for key, found in (("dtype", entry.dtype), ("shape", list(entry.shape))):
            if found != tensor.get(key):
                detail = f"tensor {name} has {key} {found} there, {tensor.get(key)} in the base"
                raise CheckError(_differs(base.folder, detail))
    extra = sorted(set(base.entries) - set(expected))
    if extra:
        raise CheckError(_differs(base.folder, f"tensor {extra[0]} is not in the base"))
    if tokenizer is not None and tokenizer_digest(base.folder) not in (None, tokenizer):
        raise CheckError(_differs(base.folder, "tokenizer.json gives other ids to texts"))
    if hashes:
        for name, tensor in fingerprint(base).items():
            check_hash(expected, base.folder, name, tensor["sha256"])


def check_hash(expected: Fingerprint, folder: Path, name: str, digest: str) -> None:
    """Raise CheckError if a tensor's hash is not the base's."""
    if digest != expected[name].get("sha256"):
        raise CheckError(_differs(folder, f"tensor {name} has other values"))


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _differs(folder: Path, detail: str) -> str:
    return f"{folder}: the delta was made from another base: {detail}"

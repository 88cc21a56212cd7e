"""Copies are exact whatever the file system offers, and merging does without torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esft.copying import copy_file, copy_other_files
from esft.errors import OutputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("size", [0, 1, 5000, (1 << 26) + 17])
def test_a_copy_is_exact_and_counted(tmp_path, size):
    (tmp_path / "a").write_bytes(os.urandom(size))
    told: list[int] = []
    copy_file(tmp_path / "a", tmp_path / "b", told.append)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert sum(told) == size


@pytest.mark.parametrize("fails_after", [0, 1])
@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_the_system_cannot_copy_it_is_done_by_hand(
    tmp_path, monkeypatch, number, fails_after
):
    (tmp_path / "a").write_bytes(os.urandom(9000))
    real, calls = os.copy_file_range, []

    def refuse(source: int, target: int, size: int) -> int:
        calls.append(size)
        if len(calls) > fails_after:
            raise OSError(number, os.strerror(number))
        return real(source, target, 4000)  # fewer than asked for, as it may

    monkeypatch.setattr(os, "copy_file_range", refuse)
    told: list[int] = []
    copy_file(tmp_path / "a", tmp_path / "b", told.append)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (sum(told), len(calls)) == (9000, fails_after + 1)


def test_a_full_disk_is_told_with_the_bytes_needed(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(1234))

    def full(*_: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OutputError, match=r"b: no space left .*1,234 bytes needed"):
        copy_file(tmp_path / "a", tmp_path / "b")


def test_no_weights_are_copied_with_the_rest(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors", "pytorch_model.bin"):
        (base / name).write_text(name)
    (base / "folder").mkdir()
    copy_other_files(base, out)
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.model"}


def test_merging_imports_neither_torch_nor_transformers():
    """They cost seconds and 400 MB, more than a merge itself."""
    code = (
        "import sys, esft.merging, esft.unmerging; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)

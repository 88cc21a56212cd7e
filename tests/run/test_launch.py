"""Launchers that ask for what a run cannot do are refused before any work."""

from pathlib import Path

import pytest

import esft
from esft.errors import EsftError


@pytest.mark.parametrize("flag", ["true", "1"])
def test_accelerate_configured_for_deepspeed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", flag)
    recipe = {"model": "tiny-moe", "method": "full", "data": {"train": "none.jsonl"}}
    with pytest.raises(EsftError, match=r"ACCELERATE_USE_DEEPSPEED: .* set training.fsdp"):
        esft.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

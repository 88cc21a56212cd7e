"""What runs with losses of routers start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import save_tiny
from tests.router_runs import write_rows


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", "qwen3_moe")


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl")

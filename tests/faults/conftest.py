"""What the cases start from."""

from __future__ import annotations

import pytest

from tests.faults.material import Material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(tmp_path_factory.mktemp("faults"))

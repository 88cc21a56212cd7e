"""The scripts of examples/tiny_moe import each other by name, as scripts do; so do their tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "tiny_moe"))

"""A checkpoint that brings code of its own, with the same weights as a DeepSeek-V2 one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

CODE = Path(__file__).parent / "remote_code" / "modeling_listed.py"


def with_own_code(base: Path, out: Path, **config: Any) -> Path:
    """Copy a DeepSeek-V2 checkpoint, with the code of `modeling_listed.py` to be loaded by.

    Args:
        base: the checkpoint; its weights are taken as they are.
        out: a new folder.
        config: changes to the configuration.
    """
    shutil.copytree(base, out)
    shutil.copy(CODE, out)
    path = out / "config.json"
    own = {
        "model_type": "listed_moe",
        "architectures": ["ListedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_listed.ListedConfig",
            "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM",
        },
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own | config))
    return out

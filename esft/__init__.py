"""esft: Expert-Specialized Fine-Tuning for Mixture-of-Experts language models.

Each verb of the command line is a function here. Names are imported when first used, so that
`import esft` and `esft --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Modules have other names than the functions in them (`training`, `train`): importing a module
# binds its name in the package, which would hide a function of the same name.
_HOME = {
    "EsftError": "esft.errors",
    "ExpertMemory": "esft.offload.expert_memory",
    "Interrupted": "esft.run.interruption",
    "SaveDelta": "esft.delta_callback",
    "Scores": "esft.scores",
    "Selection": "esft.selection",
    "attach": "esft.experts",
    "compare": "esft.comparing",
    "detach": "esft.experts",
    "disable": "esft.switching",
    "evaluate": "esft.evaluating",
    "export": "esft.exporting",
    "generate": "esft.generation",
    "import_official": "esft.official",
    "init_recipe": "esft.shipped",
    "inspect": "esft.moe",
    "list_recipes": "esft.shipped",
    "load_delta": "esft.switching",
    "mask": "esft.masking",
    "merge": "esft.merging",
    "plan": "esft.planning",
    "preview_data": "esft.previewing",
    "profile": "esft.profiling",
    "select": "esft.selection",
    "set_active": "esft.switching",
    "train": "esft.training",
    "unmerge": "esft.unmerging",
    "verify": "esft.merging",
    "write_report": "esft.reporting",
}

__all__ = [
    "EsftError",
    "ExpertMemory",
    "Interrupted",
    "SaveDelta",
    "Scores",
    "Selection",
    "__version__",
    "attach",
    "compare",
    "detach",
    "disable",
    "evaluate",
    "export",
    "generate",
    "import_official",
    "init_recipe",
    "inspect",
    "list_recipes",
    "load_delta",
    "mask",
    "merge",
    "plan",
    "preview_data",
    "profile",
    "select",
    "set_active",
    "train",
    "unmerge",
    "verify",
    "write_report",
]

if TYPE_CHECKING:
    from esft.comparing import compare
    from esft.delta_callback import SaveDelta
    from esft.errors import EsftError
    from esft.evaluating import evaluate
    from esft.experts import attach, detach
    from esft.exporting import export
    from esft.generation import generate
    from esft.masking import mask
    from esft.merging import merge, verify
    from esft.moe import inspect
    from esft.official import import_official
    from esft.offload.expert_memory import ExpertMemory
    from esft.planning import plan
    from esft.previewing import preview_data
    from esft.profiling import profile
    from esft.reporting import write_report
    from esft.run.interruption import Interrupted
    from esft.scores import Scores
    from esft.selection import Selection, select
    from esft.shipped import init_recipe, list_recipes
    from esft.switching import disable, load_delta, set_active
    from esft.training import train
    from esft.unmerging import unmerge


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'esft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""How families keep a layer's routed experts and call them: one layout a file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from esft.layouts.gated_input import GatedInputLayout
from esft.layouts.interface import InterfaceLayout
from esft.layouts.layout import Layout
from esft.layouts.modules import ModulesLayout
from esft.layouts.projection import ProjectionLayout
from esft.layouts.stacks import DbrxLayout, JetMoeLayout, LongcatLayout, Step3Layout

_LAYOUTS: tuple[type[Layout], ...] = (
    InterfaceLayout,
    GatedInputLayout,
    DbrxLayout,
    LongcatLayout,
    Step3Layout,
    JetMoeLayout,
    ProjectionLayout,
    ModulesLayout,
)


def find_layout(name: str, modules: Mapping[str, nn.Module]) -> Layout | None:
    """Return the layout of the experts that a module holds, or None if it holds none.

    Args:
        name: the module's path in the model.
        modules: all modules of the model by path.
    """
    for kind in _LAYOUTS:
        found = kind.find(name, modules)
        if found is not None:
            return found
    return None

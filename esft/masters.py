"""Parameters that train in fp32 while the modules that own them compute in another dtype.

Updates of a small learning rate are rounded away in bf16. So a parameter that trains becomes fp32,
in place: the same object under the same name, to an optimizer and in a checkpoint, and tied
parameters stay tied. What the module's own code reads as `self.weight` is a cast of it to the dtype
that it had, made at each access, through which the gradient flows back and is summed up in fp32.

`torch.nn.utils.parametrize` could cast as well, but it renames the parameter
(`parametrizations.weight.original`), makes two of tied ones, and lets copies of a model share one
class, so that taking it off one of them breaks the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


def said_dtypes(model: nn.Module) -> dict[PreTrainedModel, torch.dtype]:
    """Return what each model in a model says that it computes in: its first parameter's dtype."""
    return {m: m.dtype for m in model.modules() if isinstance(m, PreTrainedModel)}


def add_masters(
    model: PreTrainedModel,
    names: Iterable[str],
    dtype: torch.dtype,
    said: Mapping[PreTrainedModel, torch.dtype] | None = None,
) -> RemovableHandle:
    """Widen parameters to a dtype; their modules go on computing in the one that they had.

    Those that are at least as wide already, as some families keep norms and routers, are left
    alone. In a state dict the parameters appear in the dtype that the modules compute in.

    Args:
        model: changed in place.
        names: of parameters; of tied ones, all.
        dtype: of the masters.
        said: what the models in it go on saying that they compute in; default what they say now.

    Returns:
        what `remove_masters` needs.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    said = said_dtypes(model) if said is None else said
    narrow: dict[nn.Parameter, torch.dtype] = {}
    owned: dict[Any, dict[str, torch.dtype]] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        parameter: Any = modules[path]._parameters[own]
        if parameter not in narrow and parameter.dtype.itemsize < dtype.itemsize:
            narrow[parameter] = parameter.dtype
            _become(parameter, dtype)
        if parameter in narrow:
            owned.setdefault(modules[path], {})[own] = narrow[parameter]
    for module, dtypes in owned.items():
        module.esft_computes_in = dtypes
        module.__class__ = _casting(type(module), frozenset(dtypes))  # type: ignore[arg-type]
    for module, dtype_of_model in said.items():
        if module.dtype != dtype_of_model:  # it is that of the first parameter
            module.esft_dtype = dtype_of_model
            module.__class__ = _saying_dtype(type(module))  # type: ignore[arg-type]
    return model.register_state_dict_post_hook(_show_narrow)


def remove_masters(model: PreTrainedModel, handle: RemovableHandle) -> None:
    """Undo `add_masters`: what was trained is rounded to the dtype that its module computes in."""
    handle.remove()
    for module in list(model.modules()):
        if "esft_dtype" in vars(module):
            module.__class__ = _before(module)
            del module.esft_dtype
        for own, dtype in getattr(module, "esft_computes_in", {}).items():
            parameter: Any = module._parameters[own]
            _become(parameter, dtype)
        if "esft_computes_in" in vars(module):
            module.__class__ = _before(module)
            del module.esft_computes_in


def _become(parameter: Any, dtype: torch.dtype) -> None:
    """Give a parameter another dtype: the same object, without a gradient."""
    parameter.grad = None
    if isinstance(parameter, DTensor):  # its `data` is not all that it is made of
        other = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, other)
    else:
        parameter.data = parameter.data.to(dtype)


# Modules are told from others by their class's name, in transformers and here: the classes below
# have the names of those that they stand in for.


@functools.cache
def _casting(kind: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """Return a class whose objects read these parameters as casts of them."""

    def cast(name: str) -> property:
        def read(self: Any) -> Tensor:
            master: Tensor = self._parameters[name]
            return master.to(self.esft_computes_in[name])

        return property(read)

    def apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A router may move itself to another dtype in its forward pass (Switch Transformers).
        kind._apply(self, fn, recurse)
        for name, dtype in self.esft_computes_in.items():
            empty = torch.empty(0, dtype=dtype, device=self._parameters[name].device)
            self.esft_computes_in[name] = fn(empty).dtype
        return self

    return _variant(kind, {"_apply": apply} | {name: cast(name) for name in names})


@functools.cache
def _saying_dtype(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of models whose `dtype` is what they compute in, not their first master's."""
    return _variant(kind, {"dtype": property(lambda self: self.esft_dtype)})


def _variant(kind: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**members, **named, "__doc__": kind.__doc__})


def _before(module: nn.Module) -> type[nn.Module]:
    return type(module).__mro__[1]


def _narrow(model: nn.Module) -> Iterator[tuple[str, torch.dtype]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for own, dtype in getattr(module, "esft_computes_in", {}).items():
            yield f"{path}.{own}" if path else own, dtype


def _show_narrow(
    model: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object
) -> None:
    """Show masters in the dtype that their modules compute in; tied ones as one tensor."""
    cast: dict[int, Tensor] = {}
    for name, dtype in _narrow(model):
        master = state[prefix + name]
        state[prefix + name] = cast.setdefault(master.data_ptr(), master.to(dtype))

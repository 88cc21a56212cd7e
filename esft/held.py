"""Which part of a layer's experts a process holds, where several processes share a model.

transformers shares a model out when it loads it (`DistributedConfig`): with `ep_size` each process
holds some of a layer's experts, with `tp_size` alone a slice of each of them. All of them work on
the same batch then, so that each sees the whole gradient of what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from esft.errors import ModelError
from esft.processes import count, is_main, rank, sent_to_main


@dataclass(frozen=True)
class HeldExperts:
    """A process's part of a layer's stacks `[E, ...]`.

    Attributes:
        first: id of the first expert that is here, at least in part.
        here: how many are: those with the ids from `first` on.
        shapes: name of a stack -> its shape over all processes, `[E, ...]`.
        places: name of a stack -> the mesh of processes and how it is placed on that.
    """

    first: int
    here: int
    shapes: Mapping[str, torch.Size]
    places: Mapping[str, tuple[Any, Any]]

    @classmethod
    def of(cls, name: str, experts: nn.Module) -> Self | None:
        """Return what this process holds of the stacks of a module; None if it holds them whole.

        Args:
            name: the module's, for messages.
            experts: has the stacks as parameters of its own.

        Raises:
            ModelError: the stacks are shared out in a way that no selection can be attached in.
        """
        stacks: dict[str, Any] = dict(experts.named_parameters(recurse=False))
        by_expert = bool(getattr(experts, "_is_expert_parallel", False))
        if not any(isinstance(stack, DTensor) for stack in stacks.values()):
            if by_expert:
                raise ModelError(f"{name}: expert parallelism of a kind that esft does not know")
            return None
        for stack in stacks.values():
            dims = [getattr(placement, "dim", None) for placement in stack.placements]
            if len(dims) != 1 or (dims[0] == 0) != by_expert:
                raise ModelError(
                    f"{name}: its experts are sharded by FSDP ({', '.join(map(str, dims))}); "
                    f"attach the selection to the whole model and shard it after that, or share "
                    f"the experts out with DistributedConfig(tp_size=N, ep_size=N)"
                )
            if stack.device_mesh.size() != count():
                raise ModelError(
                    f"{name}: shared out among {stack.device_mesh.size()} of {count()} processes; "
                    f"only DistributedConfig(tp_size={count()}, ep_size={count()}), or tp_size "
                    f"alone, is supported"
                )
        E = next(iter(stacks.values())).shape[0]
        here = E // count() if by_expert else E
        return cls(
            first=rank() * here if by_expert else 0,
            here=here,
            shapes={key: stack.shape for key, stack in stacks.items()},
            places={key: (stack.device_mesh, stack.placements) for key, stack in stacks.items()},
        )

    @property
    def by_expert(self) -> bool:
        """Whether an expert is whole on one process; otherwise each has a slice of it."""
        return all(self.here < shape[0] for shape in self.shapes.values())

    def keep(self, experts: nn.Module) -> None:
        """Leave a module the parts of its stacks that are here, as ordinary parameters."""
        stacks: dict[str, Any] = dict(experts.named_parameters(recurse=False))
        for name, stack in stacks.items():
            own = stack.detach().to_local()
            experts.register_parameter(name, nn.Parameter(own, requires_grad=False))

    def ids_here(self, experts: Sequence[int]) -> list[int]:
        """Return those of some experts that are here, in their order, numbered from `first`."""
        numbers = (expert - self.first for expert in experts)
        return [number for number in numbers if 0 <= number < self.here]

    def shared(self, name: str, part: Tensor) -> Tensor:
        """Return a stack as it was before `keep`, from the part that is here."""
        mesh, placements = self.places[name]
        shape = self.shapes[name]
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=_stride(shape)
        )

    def collected(self, name: str, bank: Tensor, selected: Sequence[int]) -> Tensor | None:
        """Return a weight of all selected experts in the main process, None elsewhere.

        All processes must call this.

        Args:
            name: of the stack.
            bank: the weight of those that are here, `[n_here, ...]`, in the selection's order.
            selected: ids of all n of them.

        Returns:
            `[n, ...]`.

        Raises:
            ElsewhereError, LostProcessError: see `esft.processes.together`.
        """
        if not self.by_expert:
            mesh, placements = self.places[name]
            shape = torch.Size([len(selected), *self.shapes[name][1:]])
            part = DTensor.from_local(
                bank, mesh, placements, run_check=False, shape=shape, stride=_stride(shape)
            )
            whole = part.full_tensor()
            return whole if is_main() else None
        banks = sent_to_main(bank, "put the trained experts together")
        if banks is None:
            return None
        left = [iter(bank) for bank in banks]
        return torch.stack([next(left[expert // self.here]) for expert in selected])


def refuse_unknown_sharing(model: nn.Module) -> None:
    """Check that a model is not shared out in a way that `HeldExperts` cannot tell.

    Raises:
        ModelError: it is a pipeline, or transformers is older than its expert parallelism.
    """
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if config is None:
        return
    if (getattr(config, "pp_size", None) or 1) > 1:
        raise ModelError("a model in pipeline stages (pp_size) cannot have a selection attached")
    if find_spec("transformers.distributed.expert_parallel") is None:
        raise ModelError("a model that processes share (DistributedConfig) needs transformers 5.21")


def whole(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters with those that processes share put together, tied ones as one tensor.

    All processes must call this where any is shared.
    """
    found: dict[int, Tensor] = {}
    return {
        name: found.setdefault(id(tensor), _whole(tensor)) for name, tensor in parameters.items()
    }


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _stride(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()

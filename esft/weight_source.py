"""A checkpoint's weights as its model in transformers has them, any of them at a time.

What `from_pretrained` does for a whole model, for some of its tensors: the same names, the same
conversions, the same dtypes, bit for bit. transformers' own conversions say which tensors on disk a
tensor of the model is made of; stacks of experts are put together expert by expert, so that no
second copy of a stack is ever in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights
from transformers.utils import GENERATION_CONFIG_NAME

from esft.errors import ModelError
from esft.loading import auto_class, guarded, load_config
from esft.locating import trusted
from esft.moe import MoeLayer, moe_layers
from esft.names import layer_parts
from esft.origins import Origin, misfit, trace
from esft.places import Place
from esft.shards import Checkpoint, open_checkpoint
from esft.tensors import TORCH, read_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightSource:
    """A checkpoint opened for reading any part of it; made by `open`.

    Reading is safe from several threads; `put` and `empty` are for one at a time.

    Attributes:
        folder: of the checkpoint.
        checkpoint: where its tensors lie.
        model: in evaluation mode, its parameters and stored buffers on the meta device until they
            are `put`; what no checkpoint stores (rotary frequencies) is there.
        layers: its MoE layers.
        names: of all parameters and stored buffers; of tied ones, the one that is stored.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.folder, self.model, self.checkpoint = folder, model, checkpoint
        self.layers = moe_layers(model)
        self._hollow: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._plan = model._get_dtype_plan(model.dtype)
        self._origins = trace(model, checkpoint.entries, self._hollow)
        self._aliases = self._tie()
        self.names = tuple(self._aliases)
        self._stored = {other: name for name, others in self._aliases.items() for other in others}
        self._stacks = {
            layer.layout.tensor_names(weight)[0]: (layer, weight)
            for layer in self.layers
            for weight in layer.layout.shapes()
            if len(layer.layout.tensor_names(weight)) == 1
        }
        self._places: dict[str, dict[str, list[Place]]] = {}
        self._lock = Lock()

    @classmethod
    def open(cls, folder: Path, dtype: torch.dtype | str = "auto") -> Self:
        """Read a checkpoint's headers and build its model without weights.

        Args:
            folder: of the checkpoint.
            dtype: of the model, as for `from_pretrained`; `auto` is the checkpoint's own.

        Raises:
            ModelError: the checkpoint is missing, damaged, incomplete, pickled, quantised, dense,
                or needs code of its own.
        """
        config = load_config(folder)
        if getattr(config, "quantization_config", None):
            raise ModelError(
                f"{folder}: the weights are stored quantised; they can only be loaded as a whole: "
                f"save a dequantised copy of the checkpoint"
            )
        checkpoint = open_checkpoint(folder)
        chosen = _own_dtype(config, checkpoint) if isinstance(dtype, str) else dtype

        def build() -> PreTrainedModel:
            with no_init_weights(), init_empty_weights(include_buffers=False):
                return auto_class(config).from_config(
                    config, dtype=chosen, trust_remote_code=trusted.get()
                )

        model = guarded(folder, build)
        model.name_or_path = model.config._name_or_path = str(folder)
        if (folder / GENERATION_CONFIG_NAME).is_file() and model.can_generate():
            # Which tokens end an answer may stand there, and nowhere else.
            model.generation_config = guarded(
                folder, lambda: GenerationConfig.from_pretrained(folder), "generation config"
            )
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to("meta")
        return cls(folder, model.eval().requires_grad_(False), checkpoint)

    @property
    def expert_names(self) -> set[str]:
        """Names of all weights of routed experts."""
        return {
            name
            for layer in self.layers
            for weight in layer.layout.shapes()
            for name in layer.layout.tensor_names(weight)
        }

    def under(self, path: str) -> tuple[str, ...]:
        """Return the names of what is in a module, such as `model.layers.3`."""
        return tuple(name for name in self.names if name.startswith(f"{path}."))

    def stored_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes on disk that these tensors are made of."""
        found = {key for name in names for key in self._origin(name).stored}
        entries = [self.checkpoint.entries[key] for key in found]
        return sum(entry.end - entry.start for entry in entries)

    def shape(self, name: str) -> torch.Size:
        """Return the shape that a tensor has in the model."""
        return self._hollow[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor has in the model."""
        for glob, planned in self._plan.items():
            if re.search(glob.replace("*", ".*"), name):
                return planned
        return self._hollow[name].dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors onto the CPU: their names in the model, of tied ones the stored one's.

        Raises:
            ModelError: a file is missing or ends too early, or the model has no such tensor.
        """
        found: dict[str, Tensor] = {}
        wanted = list(dict.fromkeys(map(self._canonical, names)))
        for name in wanted:
            if name in found:
                continue
            stack = self._read_stack(name) if name in self._stacks else None
            if stack is None:
                found |= self._convert(self._origin(name))
            else:
                found[name] = stack
        return {name: found[name] for name in wanted}

    def read_expert(self, layer: MoeLayer, expert: int) -> dict[str, Tensor]:
        """Read one expert: weight, as in `layer.layout.shapes()` -> its slice `[...]`.

        Raises:
            ModelError: as `read`, or the experts are stored in a way that cannot be addressed.
        """
        slices = {}
        for weight, shape in layer.layout.shapes().items():
            names = layer.layout.tensor_names(weight)
            dtype = self.dtype(names[0] if len(names) == 1 else names[expert])
            slices[weight] = torch.empty(shape[1:], dtype=dtype)
            for place in self.places(layer)[weight]:
                self._read_share(place, expert, slices[weight])
        return slices

    def places(self, layer: MoeLayer) -> dict[str, list[Place]]:
        """Return where a layer's experts lie on disk, by weight.

        Raises:
            ModelError: the experts are stored in a way that cannot be addressed by expert.
        """
        with self._lock:
            if layer.name not in self._places:
                shapes = {key: {"shape": e.shape} for key, e in self.checkpoint.entries.items()}
                self._places[layer.name] = {
                    weight: [Place.of(part) for part in parts]
                    for weight, parts in layer_parts(self.model, layer, shapes).items()
                }
            return self._places[layer.name]

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the model have these tensors, on whatever device they are; tied ones together."""
        for name, tensor in tensors.items():
            self._set(self._canonical(name), tensor)

    def fill(self, names: Iterable[str]) -> None:
        """Read tensors and let the model have them, on the CPU. See `read`."""
        for name in names:
            self.put(self.read([name]))

    def move_buffers(self, device: torch.device) -> None:
        """Bring to a device the buffers that the model has, such as what no checkpoint stores."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def empty(self, names: Iterable[str]) -> None:
        """Take these tensors from the model again: they are on the meta device, as at the start."""
        for name in map(self._canonical, names):
            self._set(name, self._hollow[name])

    def _tie(self) -> dict[str, list[str]]:
        """Tie what is not stored to what is: name of a stored tensor -> all names of it."""
        missing = self._hollow.keys() - self._origins.keys()
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        if missing:
            raise ModelError(
                f"{self.folder}: the checkpoint lacks {len(missing):,} of the model's tensors, "
                f"among them {min(missing)}; it is incomplete or of another architecture"
            )
        names_of: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            names_of.setdefault(id(tensor), []).append(name)
        return {
            next(name for name in names if name in self._origins): names
            for names in names_of.values()
        }

    def _canonical(self, name: str) -> str:
        if name not in self._stored:
            raise ModelError(f"{self.folder}: the model has no tensor {name}")
        return self._stored[name]

    def _origin(self, name: str) -> Origin:
        return self._origins[self._canonical(name)]

    def _convert(self, origin: Origin) -> dict[str, Tensor]:
        def read(key: str) -> Tensor:
            entry = self.checkpoint.entries[key]
            # transformers casts before it converts, to what the first of the tensors has.
            return read_numbers(entry).view(entry.shape).to(self.dtype(origin.target))

        made = origin.make(self.model, read)
        for name, tensor in made.items():
            if name in self._hollow and tensor.shape != self.shape(name):
                raise misfit(name, f"{list(tensor.shape)} instead of {list(self.shape(name))}")
        return made

    def _read_stack(self, name: str) -> Tensor | None:
        """Put a stack together expert by expert; None if the files do not hold it that way."""
        layer, weight = self._stacks[name]
        places = self.places(layer)[weight]
        keys = {key for place in places for key in place.names}
        if missing := keys - self.checkpoint.entries.keys():
            if missing == keys:
                return None
            raise misfit(name, f"{min(missing)} and {len(missing) - 1:,} more are missing")
        stack = torch.empty(self.shape(name), dtype=self.dtype(name))
        by_expert = stack.view(layer.layout.shapes()[weight])
        for expert in range(by_expert.shape[0]):
            for place in places:
                self._read_share(place, expert, by_expert[expert])
        return stack

    def _read_share(self, place: Place, expert: int, expert_slice: Tensor) -> None:
        entry = self.checkpoint.entries[place.name(expert)]
        size = place.shape.numel()
        start = expert * size if place.fused else 0
        fits = entry.shape[1:] if place.fused and place.each is None else entry.shape
        if start + size > math.prod(entry.shape) or (place.each is None and fits != place.shape):
            raise misfit(place.name(expert), f"its shape is {list(entry.shape)}")
        place.write(expert_slice, read_numbers(entry, start, start + size))

    def _set(self, name: str, tensor: Tensor) -> None:
        for alias in self._aliases[name]:
            path, _, own = alias.rpartition(".")
            module = self.model.get_submodule(path)
            if own in module._buffers:
                module._buffers[own] = tensor
                continue
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            module._parameters[own] = tensor


def _own_dtype(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Return what `from_pretrained` takes for `auto`."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floats = (TORCH[e.dtype] for e in checkpoint.entries.values() if e.dtype in TORCH)
    return next(floats, torch.float32)

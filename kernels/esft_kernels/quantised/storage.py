"""A weight in blocks of few bits: plain tensors, cut by expert without a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esft_kernels.quantised.decoding import decode
from esft_kernels.quantised.kinds import SCALES, Kind, kind_named


@dataclass(frozen=True, eq=False)  # compared as a tensor would be: not at all
class Quantised:
    """A weight `[..., C]` in blocks along its last dimension; no block crosses a row.

    A weight is `scale * value(code) + offset`, computed in fp32 and rounded to `dtype` once. The
    value of a code is the codebook's for `nf4`, else the code itself; kinds without an offset add
    none. The last block of a row may be shorter. It stands in for a tensor where a frozen bank is
    asked for: it has `shape`, `dtype` and `device`, and gives experts by `[]`.

    Attributes:
        kind: one of `KINDS`, by name.
        columns: C.
        block: weights that share a scale.
        dtype: of the weight, in which it is computed with.
        codes: `[..., bytes]` uint8, packed as `packing` says; for `int8` `[..., C]` int8.
        scale: `[..., B]` bf16, B = C / block, rounded up.
        offset: `[..., B]` bf16, or None for `int8` and `nf4`.
    """

    kind: str
    columns: int
    block: int
    dtype: torch.dtype
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...] | torch.Size,
        kind: str,
        block: int = 64,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Quantised:
        """Allocate storage for a weight of this shape, to be filled by `copy_`.

        On the meta device it takes no memory, and `nbytes` says what it would take.

        Raises:
            ValueError: no such kind; a block that is no multiple of 8; no columns.
        """
        form = kind_named(kind)
        *rows, columns = shape
        if block < 8 or block % 8:
            raise ValueError(f"block: expected a multiple of 8, got {block}")
        if columns < 1:
            raise ValueError(f"shape: expected at least one column, got {list(shape)}")
        blocks = -(-columns // block)

        def scales() -> Tensor:
            return torch.empty(*rows, blocks, dtype=SCALES, device=device)

        width = form.row_bytes(columns)
        codes = torch.empty(*rows, width, dtype=form.code_dtype, device=device)
        offset = scales() if form.offset else None
        return cls(kind, columns, block, dtype, codes, scales(), offset)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Quantised:
        """Put together what `tensors` and `metadata` took apart; leading dimensions may be cut.

        Raises:
            ValueError: a tensor or an entry is missing, or has another shape or dtype.
        """
        wanted = {"kind", "columns", "block", "dtype"}
        if missing := sorted(wanted - set(metadata)):
            raise ValueError(f"metadata: {', '.join(missing)} missing")
        form = kind_named(metadata["kind"])
        needed = ["codes", "scale", *(["offset"] if form.offset else [])]
        if missing := sorted(set(needed) - set(tensors)):
            raise ValueError(f"tensors: {', '.join(missing)} missing")
        dtype = getattr(torch, metadata["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"metadata: dtype: expected a float's name, got {metadata['dtype']!r}")
        columns, block = (_whole(metadata[key], key) for key in ("columns", "block"))
        shape = (*tensors["codes"].shape[:-1], columns)
        model = cls.empty(shape, form.name, block, dtype=dtype, device="meta")
        for name, tensor in model.tensors().items():
            found = tensors[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise ValueError(
                    f"tensors: {name}: expected {list(tensor.shape)} {tensor.dtype}, "
                    f"got {list(found.shape)} {found.dtype}"
                )
        stored: dict[str, Any] = {name: tensors[name] for name in needed}
        return replace(model, **stored)

    @property
    def form(self) -> Kind:
        """What kind of storage it is."""
        return kind_named(self.kind)

    @property
    def shape(self) -> torch.Size:
        """Of the weight: `[..., C]`."""
        return torch.Size([*self.codes.shape[:-1], self.columns])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """How many bytes it takes, scales and offsets included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dim(self) -> int:
        """Return how many dimensions the weight has."""
        return self.codes.dim()

    def tensors(self) -> dict[str, Tensor]:
        """Return what to store, by name: in a module's buffers, or in a safetensors file."""
        found = {"codes": self.codes, "scale": self.scale, "offset": self.offset}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def metadata(self) -> dict[str, str]:
        """Return what to store beside `tensors`."""
        return {
            "kind": self.kind,
            "columns": str(self.columns),
            "block": str(self.block),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def each(self, change: Callable[[Tensor], Tensor]) -> Quantised:
        """Return it with each of its tensors changed, as by `Tensor.pin_memory`."""
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Quantised:
        """Return it on another device; itself where it is there."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def __getitem__(self, rows: int | slice | Tensor) -> Quantised:
        """Cut the first dimension: an expert or a slice as a view, a tensor of ids as a copy."""
        if self.dim() < 2:
            raise IndexError("a single row has no first dimension to cut")
        return self.each(lambda tensor: tensor[rows])

    def copy_(self, other: Quantised, *, non_blocking: bool = False) -> Quantised:
        """Overwrite it, as an expert `bank[e]` of a bank, and return it.

        Raises:
            ValueError: the other has another shape, kind or block.
        """
        own, its = (
            (list(each.shape), each.kind, f"blocks of {each.block}") for each in (self, other)
        )
        if own != its:
            raise ValueError(f"other: expected {own}, got {its}")
        source = other.tensors()
        for name, tensor in self.tensors().items():
            tensor.copy_(source[name], non_blocking=non_blocking)
        return self

    def dequantise(self, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        """Compute the weight. Takes a buffer of a few MB at most beside the result.

        Args:
            dtype: of the result; default `self.dtype`, or out's.
            out: where to write it: contiguous, of this shape, on this device.

        Returns:
            The weight, `[..., C]`; out where it is given.

        Raises:
            ValueError: out does not fit.
        """
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        elif out.shape != self.shape or not out.is_contiguous() or dtype not in (None, out.dtype):
            raise ValueError(
                f"out: expected contiguous {list(self.shape)} {dtype or 'of any dtype'}, "
                f"got {list(out.shape)} {out.dtype} with strides {out.stride()}"
            )
        decode(
            self.codes.reshape(-1, self.codes.shape[-1]),
            self.scale.reshape(-1, self.scale.shape[-1]),
            None if self.offset is None else self.offset.reshape(-1, self.offset.shape[-1]),
            self.form,
            self.block,
            out.view(-1, self.columns),
        )
        return out


def _whole(text: str, key: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"metadata: {key}: expected a whole number, got {text!r}") from error

"""The floating-point dtypes of a delta by safetensors' names: their widths, and what is finite."""

from __future__ import annotations

import numpy as np

# The bit pattern as a number, and its exponent's bits (IEEE 754; bfloat16 is the upper half of
# a float32): all of them set means NaN or infinite.
_EXPONENT = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


FLOATS = tuple(_EXPONENT)


def width(dtype: str) -> int:
    """Return the bytes of one number of a dtype in `FLOATS`."""
    return np.dtype(_EXPONENT[dtype][0]).itemsize


def is_finite(values: bytes, dtype: str) -> bool:
    """Whether none of the numbers, given as they lie in a file, is NaN or infinite."""
    kind, exponent = _EXPONENT[dtype]
    bits = np.frombuffer(values, kind)
    return not bool(((bits & bits.dtype.type(exponent)) == exponent).any())

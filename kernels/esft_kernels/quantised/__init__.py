"""Weights stored block by block in 8 to 2 bits, and read back some rows at a time."""

from esft_kernels.quantised.kinds import KINDS, Kind
from esft_kernels.quantised.quantiser import quantise
from esft_kernels.quantised.storage import Quantised

__all__ = ["KINDS", "Kind", "Quantised", "quantise"]

"""What is trained and what is saved: one method a file, all through the contract in `base`."""

from __future__ import annotations

from esft.methods.base import Method
from esft.methods.expert import ExpertMethod
from esft.methods.full import FullMethod
from esft.methods.lora import LoraMethod

__all__ = ["ExpertMethod", "FullMethod", "LoraMethod", "Method"]

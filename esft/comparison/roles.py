"""What part a method plays in the paper's claims, told by its name in the comparison."""

from __future__ import annotations

from collections.abc import Iterable

FULL = "full"


def is_esft(method: str) -> bool:
    """Tell whether a method is the paper's: selected experts train, and nothing beside them."""
    return method in ("esft", "esft-token", "esft-gate")


def is_lora(method: str) -> bool:
    """Tell whether a method is LoRA on all experts, at the paper's rank or at ESFT's bytes."""
    return method in ("lora", "lora-matched")


def is_control(method: str) -> bool:
    """Tell whether a method trains experts that are drawn by chance."""
    return method in ("random", "random-unselected")


def pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs that are compared: each method with `full`, each ESFT with each control."""
    names = list(methods)
    found = [(name, FULL) for name in names if name != FULL and FULL in names]
    controls = [name for name in names if is_control(name)]
    return found + [(name, control) for name in names if is_esft(name) for control in controls]

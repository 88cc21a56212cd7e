"""How much memory this process can still have."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from esft import processes
from esft.moe import text_config
from esft.progress import Reporter
from esft.report.numerals import size

WEIGHTS_SHARE = 0.8  # of the free memory; the rest is for what is computed with them
_CGROUPS = Path("/sys/fs/cgroup")
# Version 2 and 1: limit, in use, and the part of that which is given back when it is wanted.
_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; of the machine's, a process gets its share.

    On a CPU that is the least of what the machine has and what the control groups leave that the
    process is in (a container, a job of a cluster).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    left = [int(psutil.virtual_memory().available), *groups_left(Path("/proc/self/cgroup"))]
    return min(left) // processes.count()


def too_large(
    skeleton: nn.Module, dtype: torch.dtype | str, device: torch.device, reporter: Reporter
) -> bool:
    """Return whether a model's weights leave too little of a device's free memory, and say so.

    Args:
        skeleton: the model on the meta device.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        device: that they would go to.
        reporter: told if they do.
    """
    if isinstance(dtype, str):
        dtype = text_config(skeleton).dtype or torch.float32
    needed = dtype.itemsize * sum(parameter.numel() for parameter in skeleton.parameters())
    free = available_memory(device)
    if needed <= WEIGHTS_SHARE * free:
        return False
    reporter.note(
        f"streaming: the weights take {size(needed)} as {str(dtype).removeprefix('torch.')} and "
        f"{size(free)} are free, so one layer after another is read from disk; --no-stream loads "
        f"them all"
    )
    return True


def groups_left(membership: Path, root: Path = _CGROUPS) -> list[int]:
    """Return the bytes that each control group with a limit leaves, from the innermost out.

    Args:
        membership: file that names a process's groups, see cgroups(7).
        root: where they are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # another system
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller, *names in _FILES:
            if controllers.split(",").count(controller):
                inner = PurePosixPath(path.lstrip("/"))
                for group in (inner, *inner.parents):
                    left += _left(root / controller / group, *names)
    return left


def _left(group: Path, limit: str, used: str, returned: str) -> list[int]:
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # not there, or "max"
        return []
    stat = dict(line.split() for line in lines)
    return [max(0, most - now + int(stat.get(returned, 0)))]

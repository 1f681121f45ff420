"""The devices and the memory that a process sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def visible_bytes() -> int:
    """All memory of the devices that this process sees, or host memory where it sees none."""
    import torch  # not for keepers, which ask for the machine's alone

    if not torch.cuda.is_available():
        return machine_bytes()
    devices = range(torch.cuda.device_count())
    return sum(int(torch.cuda.get_device_properties(i).total_memory) for i in devices)


def ranks_per_node(asked: int | Literal["auto"]) -> int:
    """``cluster.ranks_per_node``; auto: one for each GPU that this process sees, at least one."""
    if asked != "auto":
        return asked
    import torch  # not for keepers

    return max(1, torch.cuda.device_count())


def machine_bytes(limit: Path = _CGROUP_LIMIT) -> int:
    """Host memory, or what this container may use of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = limit.read_text(encoding="ascii").strip()
    except OSError:  # no container, or one that does not say
        return whole
    return min(whole, int(text)) if text.isdecimal() else whole

"""Devices and memory that a process can use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def visible_bytes() -> int:
    """Total memory of the GPUs visible to this process, in bytes; host memory if there are none."""
    import torch  # imported here: keepers run without torch

    if not torch.cuda.is_available():
        return machine_bytes()
    devices = range(torch.cuda.device_count())
    return sum(int(torch.cuda.get_device_properties(i).total_memory) for i in devices)


def ranks_per_node(asked: int | Literal["auto"]) -> int:
    """Resolve ``cluster.ranks_per_node``: "auto" is the number of visible GPUs, at least 1."""
    if asked != "auto":
        return asked
    import torch  # not for keepers

    return max(1, torch.cuda.device_count())


def machine_bytes() -> int:
    """Host memory in bytes, or this container's limit if that is lower."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:  # no container, or no cgroup limit
        return whole
    return min(whole, int(text)) if text.isdecimal() else whole

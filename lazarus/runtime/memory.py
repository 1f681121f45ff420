"""The memory that a process sees: its devices', else its machine's."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def visible_bytes() -> int:
    """All memory of the devices that this process sees, or host memory where it sees none."""
    import torch  # not for keepers, which ask for the machine's alone

    if not torch.cuda.is_available():
        return machine_bytes()
    devices = range(torch.cuda.device_count())
    return sum(int(torch.cuda.get_device_properties(i).total_memory) for i in devices)


def machine_bytes(limit: Path = _CGROUP_LIMIT) -> int:
    """Host memory, or what this container may use of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        text = limit.read_text(encoding="ascii").strip()
    except OSError:  # no container, or one that does not say
        return whole
    return min(whole, int(text)) if text.isdecimal() else whole

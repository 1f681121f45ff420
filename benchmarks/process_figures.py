"""Memory and processor time of a process, as Linux tells them."""

from __future__ import annotations

import os
from pathlib import Path


def memory_mb(name: str, pid: int | str = "self") -> float:
    """``VmRSS`` or ``VmHWM`` of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(float(line.split()[1]) for line in status.splitlines() if name in line) / 1024


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used: what it would take on a machine of its own."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_mb(pid: int) -> float:
    """Memory of a process that it shares with no other one."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024

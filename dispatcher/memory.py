"""Let the C library keep freed memory: buffers of a step are asked for again in the next one."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(limit_bytes: int = 1 << 30) -> bool:
    """Raise glibc's thresholds for giving memory back to the system.

    By default every buffer above 32 MiB, and often smaller ones, is mapped and zeroed page by page
    anew. Call it once in a process, before its large allocations.

    Args:
        limit_bytes: Blocks up to this size are kept.

    Returns:
        Whether this C library took the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    limit = min(limit_bytes, (1 << 31) - 1)
    return bool(mallopt(_M_MMAP_THRESHOLD, limit)) and bool(mallopt(_M_TRIM_THRESHOLD, limit))

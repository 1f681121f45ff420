"""Let the C library keep freed memory, because every step allocates the same buffers again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(limit_bytes: int = 1 << 30) -> bool:
    """Raise glibc's thresholds for returning freed memory to the system.

    By default glibc maps and zeroes every buffer above 32 MiB, and often smaller ones, anew. Call
    this function once per process, before the first large allocation.

    Args:
        limit_bytes: Freed blocks up to this size are kept; at most 2 GiB - 1.

    Returns:
        Whether the C library accepted the setting (False on systems without glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    limit = min(limit_bytes, (1 << 31) - 1)
    return bool(mallopt(_M_MMAP_THRESHOLD, limit)) and bool(mallopt(_M_TRIM_THRESHOLD, limit))

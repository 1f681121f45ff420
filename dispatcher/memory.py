"""Let the C library keep freed memory, because every step allocates the same buffers again."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIMIT_BYTES = 1 << 30  # larger freed blocks go back to the system


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for returning freed memory to the system.

    By default glibc maps and zeroes every buffer above 32 MiB, and often smaller ones, anew. Call
    this function once per process, before the first large allocation.

    Returns:
        Whether the C library accepted the setting (False on systems without glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(what, _LIMIT_BYTES) for what in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))

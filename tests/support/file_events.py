"""Waiting until another process has written something, or has ended: the kernel says when."""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE_S = 240.0  # for a small run to come to a step on a loaded machine
_MODIFY, _MOVED_TO, _CREATE = 0x2, 0x80, 0x100  # of inotify
_LIBC = ctypes.CDLL(None, use_errno=True)


class Changes:
    """Tells of files that change in a folder, and in folders directly below it.

    Args:
        folder: Must exist; what is made in it later is watched too.
        process: Its end is a change as well.
    """

    def __init__(self, folder: Path, process: subprocess.Popen[Any] | None = None) -> None:
        self._folder = folder
        self._queue = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._queue >= 0, os.strerror(ctypes.get_errno())
        self._poll = select.poll()
        self._poll.register(self._queue, select.POLLIN)
        self._end = -1
        if process is not None:
            with suppress(ProcessLookupError):  # it has ended and was waited for
                self._end = os.pidfd_open(process.pid)
                self._poll.register(self._end, select.POLLIN)
        self.watch()

    def watch(self) -> None:
        """Watch folders that were made since."""
        below = [path for path in self._folder.iterdir() if path.is_dir()]
        for path in (self._folder, *below):
            _LIBC.inotify_add_watch(self._queue, os.fsencode(path), _MODIFY | _MOVED_TO | _CREATE)

    def wait(self, seconds: float) -> bool:
        """Wait for the next change; False if there was none for so long."""
        found = self._poll.poll(seconds * 1000)
        with suppress(BlockingIOError):
            os.read(self._queue, 1 << 16)
        return bool(found)

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._queue)
        if self._end >= 0:
            os.close(self._end)


def wait_until(
    look: Callable[[], Any],
    folder: Path,
    process: subprocess.Popen[Any],
    *,
    seconds: float = PATIENCE_S,
) -> Any:
    """What ``look`` finds, once it finds something; None if the process ends before.

    Args:
        look: Is called again whenever a file in ``folder`` has changed.
        folder: See ``Changes``.
        process: Who writes.
        seconds: For how long nothing may change.
    """
    with Changes(folder, process) as changes:
        while not (found := look()):
            if process.poll() is not None:
                return look() or None
            assert changes.wait(seconds), f"nothing has changed in {folder} for {seconds:.0f} s"
            changes.watch()
    return found
